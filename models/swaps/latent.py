"""Latent attention: `expand_kv`, which makes keys and values of cached latents, leaves them as they are, and attention takes them so."""

from __future__ import annotations

from typing import Any

import torch

from . import Patch, Swap
from .context import Context, TraceError, current
from .masks import Mask

_ingot = torch.ops.ingot


class Latent(Swap):
    """Modules with `expand_kv` over a `kv_b_proj`: attention recognizes them by the method."""

    def __init__(self, model: torch.nn.Module, context: Context) -> None:
        self.classes = {type(m) for m in model.modules() if hasattr(type(m), "expand_kv")}

    def observers(self) -> list[Patch]:
        return self.patches()

    def patches(self) -> list[Patch]:
        return [Patch(cls, "expand_kv", _leave) for cls in self.classes]


def _leave(module: Any, latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """latent [1, 1, T, L] and rope [1, 1, T, R] in the places of keys and values."""
    return latent, rope


def latent_attention(module: Any, query: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, mask: Mask, scale: float,
                     indices: torch.Tensor | None, sinks: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    """query [1, H, T, N + R], latent [1, 1, T, L], rope [1, 1, T, R], indices [1, T, K], sinks [H] → [1, T, H, F]."""
    nope, width = module.qk_nope_head_dim, module.v_head_dim
    if mask.chunk or module.kv_b_proj.bias is not None:
        raise TraceError(f"{type(module).__name__}: latent attention in chunks, or with a bias of its up-projection, has no absorbed form")
    q, c, r = query.squeeze(0).transpose(0, 1), latent.reshape(-1, latent.shape[-1]), rope.reshape(-1, rope.shape[-1])
    context = current()
    name = context.latent_cache(c, r)
    if context.observing:
        return q.new_empty(1, q.shape[0], q.shape[1], width)
    step = context.values
    step[name] = _ingot.latent_write(c, r, step[name], step["slot_mapping_latent"])
    up = module.kv_b_proj.weight.view(-1, nope + width, c.shape[-1])
    q_latent = _ingot.head_linear(q[..., :nope], up[:, :nope].transpose(1, 2))
    out = _ingot.mla_attention(q_latent, q[..., nope:], step[name], step["cu_seqlens_q"], step["seq_lens"], step["page_table_latent"],
                               None if indices is None else indices.squeeze(0), sinks, scale, mask.window)  # fmt: skip
    return _ingot.head_linear(out, up[:, nope:]).unsqueeze(0)
