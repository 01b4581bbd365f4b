"""Integers of 4 or 8 bits with a scale for each row, or for each group of a row: value = (code − zero) · scale.

Codes are unsigned; a symmetric format's zero is the middle, 8 or 128, and others store one for each scale. Groups lie along K
and the last may be a part. Names: `int8_channel`, `int4_group128`, `int4_group32_zero`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..target import Target
from .format import Format, Parts, register

TILE = 16
"""Rows of the weight that lie together in layout "tile16"."""


class Integer(Format):
    """`group` elements of a row share a scale; −1: the whole row.

    Plain parts: weight uint8 [N, K], scale [N, G], zero [N, G] of the scale's dtype, G = ⌈K / group⌉.

    Layout "tile16" (CPU, dot products of four bytes): tiles of 16 rows, N and K padded. 8 bits: weight uint8 [N/16, K/4, 16, 4]. 4 bits:
    uint8 [N/16, K/8, 16, 4], whose low nibbles are columns 8c … 8c+3 and high ones 8c+4 … 8c+7. scale, zero [N/16, G, 16].

    Layout "rows" (GPU): 8 bits: weight int8 [N, K], code − 128. 4 bits: int32 [N, 16 ⌈K/128⌉]: nibble q of word 16 c + i is column
    128 c + 16 q + i, so that 16 columns come from one place of 16 words. scale, zero [N, G].
    """

    def __init__(self, bits: int, group: int, zero: bool) -> None:
        self.bits, self.group, self.zero = bits, group, zero
        self.name = f"int{bits}_{'channel' if group < 0 else f'group{group}'}{'_zero' if zero else ''}"
        self.parts = ("weight", "scale", "zero") if zero else ("weight", "scale")
        self.middle = 1 << (bits - 1)
        self.top = (1 << bits) - 1

    def quantize(self, weight: torch.Tensor) -> Parts:
        n, k = weight.shape
        group = k if self.group < 0 else self.group
        dtype = weight.dtype
        w = F.pad(weight.float(), (0, -k % group)).reshape(n, -1, group)
        if self.zero:
            low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
            scale = _positive((high - low) / self.top).to(dtype)
            zero = (-low / scale.float()).round().clamp(0, self.top)
        else:
            scale = _positive(w.abs().amax(-1) / (self.top / 2)).to(dtype)
            zero = torch.full_like(scale, self.middle, dtype=torch.float32)
        codes = (w / scale.float()[..., None]).round().add_(zero[..., None]).clamp_(0, self.top)
        parts = {"weight": codes.to(torch.uint8).reshape(n, -1)[:, :k], "scale": scale}
        return parts | ({"zero": zero.to(dtype)} if self.zero else {})

    def dequantize(self, parts: Parts) -> torch.Tensor:
        k = parts["weight"].shape[1]
        zero = self.columns(parts["zero"], k) if self.zero else self.middle
        return (parts["weight"].float() - zero) * self.columns(parts["scale"], k)

    def columns(self, values: torch.Tensor, k: int) -> torch.Tensor:
        """[N, G] → float32 [N, K]: each column's."""
        return values.float().expand(-1, k) if self.group < 0 else values.float().repeat_interleave(self.group, 1)[:, :k]

    def activation(self, target: Target) -> str:
        return "none" if target.kind == "cuda" else f"int8_group{128 if self.group < 0 else self.group}"

    def layout(self, target: Target) -> str:
        return "rows" if target.kind == "cuda" else "tile16"

    def pack(self, parts: Parts, layout: str) -> Parts:
        codes = parts["weight"]
        scales = {name: parts[name] for name in self.parts[1:]}
        if layout == "rows":
            if self.bits == 8:
                return {"weight": (codes ^ 128).view(torch.int8), **scales}
            nibbles = F.pad(codes, (0, -codes.shape[1] % 128)).unflatten(1, (-1, 8, 16)).to(torch.int32)
            shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)[:, None]
            return {"weight": (nibbles << shifts).sum(2, dtype=torch.int32).flatten(1), **scales}
        n, k = codes.shape
        per_byte = 8 // self.bits
        codes = F.pad(codes, (0, -k % (4 * per_byte), 0, -n % TILE)).reshape(-1, TILE, -(-k // (4 * per_byte)), per_byte, 4).permute(0, 2, 1, 3, 4)
        if self.bits == 4:
            weight = codes[:, :, :, 0] | codes[:, :, :, 1] << 4
        else:
            weight = codes[:, :, :, 0].contiguous()
        return {"weight": weight, **{name: F.pad(s, (0, 0, 0, -n % TILE)).reshape(-1, TILE, s.shape[1]).transpose(1, 2) for name, s in scales.items()}}

    def unpack(self, parts: Parts, layout: str, n: int, k: int) -> Parts:
        weight = parts["weight"]
        scales = {name: parts[name] for name in self.parts[1:]}
        if layout == "rows":
            if self.bits == 8:
                return {"weight": weight.view(torch.uint8) ^ 128, **scales}
            shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)[:, None]
            return {"weight": ((weight.unflatten(1, (-1, 1, 16)) >> shifts) & 15).to(torch.uint8).flatten(1)[:, :k], **scales}
        codes = torch.stack([weight & 15, weight >> 4], 3) if self.bits == 4 else weight.unsqueeze(3)
        codes = codes.permute(0, 2, 1, 3, 4).reshape(weight.shape[0] * TILE, -1)[:n, :k]
        return {"weight": codes, **{name: s.transpose(1, 2).reshape(-1, s.shape[1])[:n] for name, s in scales.items()}}

    def moments(self, part: str, k: int) -> tuple[float, float]:
        if part == "zero":
            return float(self.middle), self.middle / 4
        scale = k**-0.5 / (self.top / 12**0.5)
        return scale, scale / 8


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """1 for a group of zeros, whose scale is no matter."""
    return torch.where(scale > 0, scale, 1.0)


register(*(Integer(bits, group, zero) for bits in (4, 8) for group in (32, 64, 128, -1) for zero in (False, True)))
