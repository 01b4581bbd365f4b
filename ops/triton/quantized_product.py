"""A call of `quantized_linear` as kernels see it: what its format and the rounding of its activations ask of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl

from .. import formats
from ..dims import Dim
from ..formats.fp8 import BLOCK, Fp8
from ..formats.integer import Integer, panel_rows
from ..kernel import Call, Steps, Tensor
from ..target import Target
from .source import FLOATS, most, supported

CHUNK = 128
"""Columns that lie together in the 4-bit layout, in 16 words."""
KINDS = {torch.float8_e4m3fn: "fp8_e4m3", torch.int8: "int8"}


@dataclass(frozen=True)
class Weights:
    """Packed parts. group: columns that share a scale, 0: all of a row; rows: rows that share one; middle: the zero where none is stored."""

    bits: int
    group: int
    rows: int
    middle: float
    zero: bool

    @classmethod
    def of(cls, name: str) -> Weights | None:
        """Of the format called `name`; None where no kernel knows it."""
        match formats.get(name):
            case Fp8(block=block):
                return cls(8, BLOCK if block else 0, BLOCK if block else 1, 0.0, False)
            case Integer(bits=bits, group=group, zero=zero, middle=middle):
                return cls(bits, max(group, 0), 1, float(middle), zero)
        return None

    def words(self, k: int) -> int:
        """Elements of memory that a row of k columns takes."""
        return -(-k // CHUNK) * CHUNK // 8 if self.bits == 4 else k

    def panel(self, n: int) -> int:
        """Rows of a weight with n rows that lie together."""
        return panel_rows(n) if self.bits == 4 else 1


@triton.jit
def begin_of(n, WIDTH: tl.constexpr, UNIT: tl.constexpr, PANEL: tl.constexpr):
    """Where rows n of a matrix begin whose rows of WIDTH elements lie in panels, UNIT elements of each together; the row's next ones are
    PANEL · UNIT further on."""
    return n // PANEL * PANEL * WIDTH + n % PANEL * UNIT


@triton.jit
def word_of(begin, COUNT: tl.constexpr, PANEL: tl.constexpr):
    """Where words of four bits for columns `begin` …, a multiple of 128, lie behind the beginning of their row: [COUNT]."""
    i = tl.arange(0, COUNT)
    return (begin // 128 + i // 16) * (16 * PANEL) + i % 16


@dataclass(frozen=True)
class Product:
    """codes: what x is rounded to, None: it is not; x_group: its columns that share a scale, 0: all."""

    call: Call
    steps: Steps
    target: Target
    weights: Weights
    codes: torch.dtype | None
    x_group: int

    @classmethod
    def of(cls, call: Call, steps: Steps, target: Target) -> Product | None:
        """None where no kernel multiplies such weights by such activations."""
        args = call.args
        x, weights = args["x"], Weights.of(args["format"])
        if weights is None or not supported(call, target) or len(x.shape) != 2 or x.dtype not in FLOATS[:2] or (args["act"] and args["n"] // 2 % weights.rows):
            return None
        if args["activation"] == "none":
            return cls(call, steps, target, weights, None, 0)
        kind, _, shared = args["activation"].rpartition("_")
        group = int(shared.removeprefix("group")) if shared.startswith("group") else 0
        if KINDS.get(args["weight"].dtype) != kind or weights.zero or (group and weights.group and group != weights.group):
            return None
        return cls(call, steps, target, weights, args["weight"].dtype, group)

    @property
    def x(self) -> Tensor:
        tensor: Tensor = self.call.args["x"]
        return tensor

    @property
    def tokens(self) -> Dim:
        return self.x.shape[0]

    @property
    def k(self) -> int:
        """Columns of the weight."""
        columns: int = self.x.shape[1]
        return columns

    @property
    def act(self) -> str | None:
        name: str | None = self.call.args["act"]
        return name

    @cached_property
    def rows(self) -> int:
        """The most rows that x has."""
        return most(self.tokens, self.steps)

    @property
    def width(self) -> int:
        """Columns of the result."""
        n: int = self.call.args["n"]
        return n // 2 if self.act else n

    def constants(self, *left_out: str) -> dict[str, Any]:
        """What kernels take as constants, but for those that one does not."""
        scale = self.call.args["scale"].shape
        all_of_them = {
            "N": self.width, "K": self.k, "WORDS": self.weights.words(self.k), "BITS": self.weights.bits, "GROUP": self.weights.group,
            "SCALES": scale[1] if len(scale) == 2 else 1, "SCALE_ROWS": self.weights.rows, "MIDDLE": self.weights.middle, "X_GROUP": self.x_group,
            "ACT": self.act, "PANEL": self.weights.panel(self.width),
        }  # fmt: skip
        return {name: value for name, value in all_of_them.items() if name not in left_out}
