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
PANEL = 16
"""Rows that lie together in layout "panels", where they divide the rows of a weight."""


def panel_rows(n: int) -> int:
    """Rows of a panel of a weight with n rows in layout "panels"."""
    return PANEL if n % PANEL == 0 else 1


class Integer(Format):
    """`group` elements of a row share a scale; −1: the whole row.

    Plain parts: weight uint8 [N, K], scale [N, G], zero [N, G] of the scale's dtype, G = ⌈K / group⌉.

    Layout "tile16" (CPU, dot products of four bytes): tiles of 16 rows, N and K padded. 8 bits: weight uint8 [N/16, K/4, 16, 4]. 4 bits:
    uint8 [N/16, K/8, 16, 4], whose low nibbles are columns 8c … 8c+3 and high ones 8c+4 … 8c+7. scale, zero [N/16, G, 16].

    Layout "rows" (GPU, 8 bits): weight int8 [N, K], code − 128. scale, zero [N, G].

    Layouts "panels" and, of experts, "fragments" (GPU, 4 bits): weight int32 [N, 16 ⌈K/128⌉], scale, zero [N, G]. Bits 4 q + 16 h … of word
    16 c + 4 t + j (q, t, j < 4, h < 2) of a row are column 128 c + 32 j + 8 q + 2 t + h: what thread t of four holds of a row when the matrix units take
    it from registers (PTX ISA, "Matrix fragments for mma.m16n8k16"), a pair of neighbours in the two halves of a word, so that a mask and an exponent
    make two floats of it. In "panels" some rows (`panel_rows`) lie together: 16 words of each, then the next 16, so that memory is read a KiB at a
    time; of scale and zero one of each.
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

    def layout(self, target: Target, experts: bool = False) -> str:
        if target.kind == "cuda":
            return "rows" if self.bits == 8 else "fragments" if experts else "panels"
        return "tile16"

    def pack(self, parts: Parts, layout: str) -> Parts:
        codes = parts["weight"]
        scales = {name: parts[name] for name in self.parts[1:]}
        if layout == "rows":
            return {"weight": (codes ^ 128).view(torch.int8), **scales}
        if layout in ("panels", "fragments"):
            rows = panel_rows(len(codes)) if layout == "panels" else 1
            nibbles = F.pad(codes, (0, -codes.shape[1] % 128)).unflatten(1, (-1, 4, 4, 4, 2)).to(torch.int32)  # c, j, q, t, h
            words = (nibbles << _shifts(codes.device)).sum((3, 5), dtype=torch.int32)  # c, j, t
            return {"weight": _in_panels(words.transpose(2, 3).flatten(1), rows, 16), **{name: _in_panels(s, rows, 1) for name, s in scales.items()}}
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
            return {"weight": weight.view(torch.uint8) ^ 128, **scales}
        if layout in ("panels", "fragments"):
            rows = panel_rows(n) if layout == "panels" else 1
            words = _in_rows(weight, rows, 16).unflatten(1, (-1, 4, 4)).transpose(2, 3)[:, :, :, None, :, None]
            codes = ((words >> _shifts(weight.device)) & 15).to(torch.uint8).flatten(1)[:, :k]
            return {"weight": codes, **{name: _in_rows(s, rows, 1) for name, s in scales.items()}}
        codes = torch.stack([weight & 15, weight >> 4], 3) if self.bits == 4 else weight.unsqueeze(3)
        codes = codes.permute(0, 2, 1, 3, 4).reshape(weight.shape[0] * TILE, -1)[:n, :k]
        return {"weight": codes, **{name: s.transpose(1, 2).reshape(-1, s.shape[1])[:n] for name, s in scales.items()}}

    def moments(self, part: str, k: int) -> tuple[float, float]:
        if part == "zero":
            return float(self.middle), self.middle / 4
        scale = k**-0.5 / (self.top / 12**0.5)
        return scale, scale / 8


def _shifts(device: torch.device) -> torch.Tensor:
    """Where nibbles lie in a word for a GPU: [q, t, h]."""
    return torch.tensor([[[4 * q, 4 * q + 16]] for q in range(4)], dtype=torch.int32, device=device)


def _in_panels(values: torch.Tensor, rows: int, unit: int) -> torch.Tensor:
    """Values [N, I · unit], `unit` of each of so many rows together."""
    n, width = values.shape
    return values.reshape(-1, rows, width // unit, unit).transpose(1, 2).reshape(n, width)


def _in_rows(values: torch.Tensor, rows: int, unit: int) -> torch.Tensor:
    """What `_in_panels` did, undone."""
    n, width = values.shape
    return values.reshape(-1, width // unit, rows, unit).transpose(1, 2).reshape(n, width)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """1 for a group of zeros, whose scale is no matter."""
    return torch.where(scale > 0, scale, 1.0)


register(*(Integer(bits, group, zero) for bits in (4, 8) for group in (32, 64, 128, -1) for zero in (False, True)))
