"""The plan: what a lowered graph becomes. Written by the compiler, bound and run by the runtime, stored as JSON.

A plan is a flat list of entries over values. Values have sizes that are linear in the step sizes (T tokens, S sequences,
R rows that need logits, `P_<group>` page-table columns, `N_<group>` pages), so that one variant serves a range of steps.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ingot.ops.dims import Dim


class Value(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor. A view shares the storage of `root`, at `offset` elements with `strides` (in elements; None: contiguous)."""

    name: str
    dtype: str  # as torch spells it: "bfloat16", "float32", "int32"
    shape: tuple[Dim, ...]
    storage: Literal["input", "weight", "state", "arena", "tickets"]  # tickets: zeros before and after every entry, one memory for all of them
    root: str = ""  # "" when it is its own root
    strides: tuple[Dim, ...] | None = None
    offset: Dim = 0
    arena_offset: int = 0  # bytes from the start of the arena, of an own root in it; a multiple of 256


class Arg(msgspec.Struct, frozen=True, omit_defaults=True):
    """One argument of an entry; one field is set (all unset: None)."""

    value: str | None = None
    view: str = ""  # with `value`: its elements reinterpreted as this dtype
    items: tuple[Arg, ...] | None = None
    dim: Dim | None = None
    const: bool | int | float | str | None = None
    number: str = ""  # "inf", "-inf" or "nan", which JSON cannot spell
    dtype: str = ""
    device: bool = False  # the device that the plan runs on

    def names(self) -> list[str]:
        """The values it reads."""
        if self.items is not None:
            return [n for i in self.items for n in i.names()]
        return [] if self.value is None else [self.value]

    def dims(self) -> list[Dim]:
        """The sizes it is."""
        if self.items is not None:
            return [d for i in self.items for d in i.dims()]
        return [] if self.dim is None else [self.dim]


class Grid(msgspec.Struct, frozen=True, omit_defaults=True):
    """One axis of a launch grid: ceil(dim / block)."""

    dim: Dim
    block: int = 1


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step of a plan.

    backend "tvm": `kernel` is a function of a shared object, called with all arguments as tensors or numbers.
    backend "triton": `kernel` is a cubin, launched on `grid`; a value is passed as its address, a size as int32.
    backend "torch": `target` ("aten.mul.Tensor", "ingot.moe") is called in eager mode; an aten result is copied into
    `outputs`, a dialect op runs its reference, which updates states in place.
    """

    node: str
    target: str
    backend: Literal["tvm", "triton", "torch"]
    args: tuple[Arg, ...]
    outputs: tuple[str, ...] = ()
    kernel: str = ""
    grid: tuple[Grid, ...] = ()
    kwargs: dict[str, Arg] = {}
    reason: str = ""  # why this kernel was chosen: "gemv_r8: fastest of 5 measured", "only claimant"

    def names(self) -> list[str]:
        """The values among its arguments: what it reads, and of a kernel what it writes too."""
        return [n for a in (*self.args, *self.kwargs.values()) for n in a.names()]


class Variant(msgspec.Struct, frozen=True, omit_defaults=True):
    """A plan for a range of steps: T ≤ `max_tokens`, S ≤ `max_seqs`, at most `max_num_new` new tokens a sequence, R ≤ `max_rows`."""

    entry_point: str  # "forward", "sample" or "embed"
    name: str
    max_tokens: int
    max_seqs: int
    max_num_new: int
    max_rows: int
    capture: tuple[int, ...]  # T at which it is replayed as a CUDA graph, ascending; a smaller step is padded to the next of them
    values: tuple[Value, ...]
    entries: tuple[Entry, ...]
    results: tuple[str, ...]
    arena_bytes: int

    @property
    def decodes(self) -> bool:
        """Whether it is captured at T = S = R, for steps with one token of every sequence."""
        return bool(self.capture) and self.max_num_new == 1

    def num_before_rows(self) -> int:
        """Entries at the front whose sizes do not depend on R: padding tokens and sequences makes them those of another step."""
        values = {v.name: v for v in self.values}

        def has_rows(dim: Dim) -> bool:
            return isinstance(dim, dict) and "R" in dim

        def depends(entry: Entry) -> bool:
            args = (*entry.args, *entry.kwargs.values())
            used = [values[n] for n in (*entry.outputs, *entry.names())]
            dims = [d for v in used for d in (*v.shape, *(v.strides or ()), v.offset)] + [g.dim for g in entry.grid] + [d for a in args for d in a.dims()]
            return any(map(has_rows, dims))

        return next((i for i, entry in enumerate(self.entries) if depends(entry)), len(self.entries))


class Kernel(msgspec.Struct, frozen=True, omit_defaults=True):
    """A compiled kernel. Its file is `kernels/<name>.<so|cubin>`, its source beside it."""

    name: str  # content-addressed: "<family>_<hash>"
    family: str
    backend: Literal["tvm", "triton"]
    symbol: str  # the function in the shared object or cubin
    file: str
    source: str
    num_warps: int = 0
    shared_bytes: int = 0
    launch_pdl: bool = False
