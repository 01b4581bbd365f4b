"""FP8 e4m3 (Micikevicius et al. 2022): value = code · scale, with a scale for each row or for each block of 128 × 128.

One scale for a whole tensor is stored as the same scale for each row, which changes no value and lets weights be joined.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..target import Target
from .format import Format, Parts, register

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK = 128


class Fp8(Format):
    """Plain parts, and the only layout, "rows": weight float8_e4m3fn [N, K], scale float32 [N] or [⌈N/128⌉, ⌈K/128⌉]."""

    parts = ("weight", "scale")

    def __init__(self, block: bool) -> None:
        self.block = block
        self.rows = BLOCK if block else 1
        self.name = "fp8_e4m3_block128" if block else "fp8_e4m3_channel"

    def quantize(self, weight: torch.Tensor) -> Parts:
        w = weight.float()
        if self.block:
            n, k = w.shape
            tiles = F.pad(w.abs(), (0, -k % BLOCK, 0, -n % BLOCK)).reshape(-(-n // BLOCK), BLOCK, -(-k // BLOCK), BLOCK)
            largest = tiles.amax((1, 3))
        else:
            largest = w.abs().amax(1)
        scale = torch.where(largest > 0, largest / LARGEST, 1.0)
        return {"weight": (w / self._elements(scale, w.shape)).clamp_(-LARGEST, LARGEST).to(E4M3), "scale": scale}

    def dequantize(self, parts: Parts) -> torch.Tensor:
        return parts["weight"].float() * self._elements(parts["scale"].float(), parts["weight"].shape)

    def _elements(self, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Scales as something that [N, K] is multiplied by."""
        return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]] if self.block else scale[:, None]

    def activation(self, target: Target) -> str:
        return "none"

    def layout(self, target: Target, experts: bool = False) -> str:
        return "rows"

    def pack(self, parts: Parts, layout: str) -> Parts:
        return parts

    def unpack(self, parts: Parts, layout: str, n: int, k: int) -> Parts:
        return parts

    def moments(self, part: str, k: int) -> tuple[float, float]:
        return (0.0, 1.0) if part == "weight" else (k**-0.5, k**-0.5 / 8)


register(Fp8(block=False), Fp8(block=True))
