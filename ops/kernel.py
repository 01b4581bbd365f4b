"""What a kernel family is: a function that claims a call of one dialect op and returns candidates, or declines with [].

    @claims("rms_norm", backend="tvm")
    def rms_norm(call: Call, steps: Steps, target: Target) -> list[Candidate]: ...

Every tensor that reaches a kernel is contiguous and 64-byte aligned (arena values and weights: 256); `page_table` rows
are `P_<group>` apart. The exception: an operand with `rows`. Outputs and scratch are allocated by the plan and hold garbage before the
launch, `Tickets` apart. A candidate must be right for every step within `steps`, padding rows included (seq_len 0, slot −1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .dims import Dim, evaluate
from .source import Backend, Source
from .target import Target


@dataclass(frozen=True)
class Tensor:
    """The type of one tensor argument or result."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Tickets(Tensor):
    """Scratch, int32, of zeros: it is zero before a launch, and the launch leaves it so.

    Programs that share a result draw numbers from it when they have done their part; the one that draws the last number finishes.
    """


@dataclass(frozen=True)
class Call:
    """One call of a dialect op, or of a region: argument values by name (`Tensor`, None, or a constant), and results' types."""

    op: str
    args: dict[str, Any]
    results: tuple[Tensor, ...]  # states excluded
    region: Any = None  # `graph.Region`, then `op` is its name


@dataclass(frozen=True)
class Steps:
    """The steps that a variant serves: 1 ≤ T ≤ max_tokens, at most `max_num_new` new tokens a sequence. `exact`: T = S = R = max_tokens, always.

    `deterministic`: what a kernel computes for a row must not depend on the other rows, nor on how many there are.
    """

    max_tokens: int
    max_seqs: int
    max_num_new: int
    max_rows: int
    exact: bool
    page_size: int = 16
    deterministic: bool = False

    def bound(self, dim: Dim) -> int:
        """The largest value of a size over T, S and R."""
        return evaluate(dim, {"T": self.max_tokens, "S": self.max_seqs, "R": self.max_rows})


@dataclass(frozen=True)
class Operand:
    """One run-time argument of a launch: argument `arg` of the call, result `out` (an index), `scratch` (an index), a `size`, or a `const`.

    `view` reinterprets a tensor's elements as another dtype of a size that divides its last dim (bfloat16 pairs as int32). `rows` says that
    the kernel takes an argument whose rows lie apart, such as some columns of a product: each is contiguous and 16-byte aligned, or a row of a
    contiguous tensor. `pitch` is how far apart they are: the elements from one row of that argument to the next, a size.
    """

    arg: str | None = None
    out: int | None = None
    scratch: int | None = None
    size: Dim | None = None
    const: int | float | None = None
    view: torch.dtype | None = None
    rows: bool = field(default=False, repr=False)  # a kernel's text says these two as well: tuning tables know a candidate by what it shows
    pitch: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Launch:
    """One kernel of a candidate, and how it is called. `grid`: (dim, block) per axis, ceil(dim / block) programs; Triton only."""

    source: Source
    operands: tuple[Operand, ...]
    grid: tuple[tuple[Dim, int], ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One way to compute a call: launches in order over shared scratch tensors. `rank`: lower first where nothing was measured or tabled.

    `inplace`: an argument like result 0 where that may lie, if nobody needs the argument afterwards. Elsewhere it is as right, and may be slower.
    """

    name: str  # "gemv_r8_w4": unique among the call's candidates
    launches: tuple[Launch, ...]
    scratch: tuple[Tensor, ...] = ()
    rank: float = 0.0
    inplace: str | None = field(default=None, repr=False)  # changes no kernel: tuning tables need not know


Claim = Callable[[Call, Steps, Target], list[Candidate]]
CLAIMS: dict[tuple[str, Backend], list[Claim]] = {}
"""Kernel families by (op, backend), in the order of registration. `ops.tvm.load()` and `ops.triton.load()` fill it."""


def claimants(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """All candidates of a dialect call for a target, best rank first: those of its generated backend, then the libraries'.

    Of deterministic steps the generated ones alone: how a library reduces depends on how many rows it is given.
    """
    generated: Backend = "triton" if target.kind == "cuda" else "tvm"
    families = [claim for backend in (generated, "torch") for claim in CLAIMS.get((call.op, backend), ())]  # type: ignore[call-overload]
    found = sorted((c for claim in families for c in claim(call, steps, target)), key=lambda c: c.rank)
    return [c for c in found if not steps.deterministic or all(launch.source.backend == generated for launch in c.launches)]


def claims(op: str, backend: Backend) -> Callable[[Claim], Claim]:
    """Register a kernel family for a dialect op."""

    def register(claim: Claim) -> Claim:
        CLAIMS.setdefault((op, backend), []).append(claim)
        return claim

    return register
