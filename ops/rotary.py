"""Rotary position embedding (Su et al. 2021). T tokens, H heads, E head dim, R rotated dims ≤ E."""

from __future__ import annotations

import torch

from .dialect import op

STYLES = ("neox", "gptj", "gptj_dup", "dsv3", "neox_half", "gptj_half", "dsv3_half")
"""How the pairs lie. neox: (i, i + R/2). gptj: (2i, 2i + 1), result interleaved too. dsv3: (2i, 2i + 1) in, neox order
out. Tables are [T, R] (neox: the frequencies twice in a row; gptj: each twice; gptj_dup: neox tables for gptj pairs) or,
with `_half`, [T, R/2]."""


@op("rotary_embedding(Tensor positions, Tensor inv_freq, float scaling, bool half) -> (Tensor, Tensor)",
    fake=lambda positions, inv_freq, scaling, half: tuple(
        inv_freq.new_empty(positions.shape[0], inv_freq.shape[0] * (1 if half else 2), dtype=torch.float32) for _ in range(2)))  # fmt: skip
def rotary_embedding(positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float, half: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions [T] × inv_freq [R/2] times `scaling` → two float32 tables [T, R] (or [T, R/2] when `half`)."""
    angles = positions.float()[:, None] * inv_freq.float()[None]
    if not half:
        angles = torch.cat([angles, angles], -1)
    return angles.cos() * scaling, angles.sin() * scaling


@op("rope(Tensor x, Tensor cos, Tensor sin, str style) -> Tensor",
    fake=lambda x, cos, sin, style: torch.empty_like(x, memory_format=torch.contiguous_format), rowwise=True)  # fmt: skip
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
    """Rotate the first R of E dims of x [T, H, E] by tables cos, sin ([T, R] or [T, R/2], see STYLES) → [T, H, E]."""
    base, half = style.removesuffix("_half"), style.endswith("_half")
    c, s = cos.float()[:, None], sin.float()[:, None]
    width = cos.shape[-1] * (2 if half else 1)
    h, rest = x[..., :width].float(), x[..., width:]
    if base == "gptj_dup":
        c, s = (t[..., : width // 2].repeat_interleave(2, -1) for t in (c, s))
    elif half:
        c, s = ((t.repeat_interleave(2, -1) if base == "gptj" else torch.cat([t, t], -1)) for t in (c, s))
    if base.startswith("gptj"):
        turned = torch.stack([-h[..., 1::2], h[..., 0::2]], -1).flatten(-2)
    else:
        if base == "dsv3":
            h = torch.cat([h[..., 0::2], h[..., 1::2]], -1)
        turned = torch.cat([-h[..., width // 2 :], h[..., : width // 2]], -1)
    return torch.cat([(h * c + turned * s).to(x.dtype), rest], -1)
