"""What a quantization format is.

A weight [N, K] in a format is a few tensors, its *parts*: codes ("weight"), scales ("scale"), sometimes zero points ("zero").
They exist in two shapes. As *plain* parts they are what `quantize` returns and checkpoints are unpacked to: one code an element, rows
along dim 0. As *packed* parts they lie as the kernels of a target read them, in one of the format's layouts. The meaning of both
is `dequantize`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..target import Target

Parts = dict[str, torch.Tensor]
FORMATS: dict[str, Format] = {}
"""By name; the modules of this folder fill it when they are imported."""


class Format(ABC):
    """A way to store a weight [N, K]. Every method works on meta tensors too: that is how the parts' shapes are known beforehand."""

    name: str
    parts: tuple[str, ...]
    rows: int = 1
    """Rows that share a scale: plain parts can be cut and joined along dim 0 at multiples of it."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> Parts:
        """Round weight [N, K] to nearest: its plain parts. Scales have the weight's dtype where the format does not fix one."""

    @abstractmethod
    def dequantize(self, parts: Parts) -> torch.Tensor:
        """The weight [N, K] in float32 that plain parts mean: the reference."""

    @abstractmethod
    def activation(self, target: Target) -> str:
        """How kernels of a target want rows of x rounded (`ops.quantized.ACTIVATIONS`), where a checkpoint asks for weights alone."""

    @abstractmethod
    def layout(self, target: Target, experts: bool = False) -> str:
        """The layout that kernels of a target read, those of experts apart."""

    @abstractmethod
    def pack(self, parts: Parts, layout: str) -> Parts:
        """Plain parts as `layout` puts them."""

    @abstractmethod
    def unpack(self, parts: Parts, layout: str, n: int, k: int) -> Parts:
        """The plain parts [n, k] that `pack` packed."""

    @abstractmethod
    def moments(self, part: str, k: int) -> tuple[float, float]:
        """Mean and deviation of random values of a floating-point part with which a weight [N, k] has about deviation k^−½. Codes in
        integers are drawn evenly."""


def register(*formats: Format) -> None:
    """Make formats known by their names."""
    FORMATS.update({f.name: f for f in formats})


def halves(parts: Parts, count: int) -> list[Parts]:
    """Plain parts cut into `count` equal pieces along the weight's rows."""
    return [dict(zip(parts, pieces, strict=True)) for pieces in zip(*(p.chunk(count) for p in parts.values()), strict=True)]


def joined(pieces: list[Parts]) -> Parts:
    """Parts one after another along dim 0."""
    return {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]}
