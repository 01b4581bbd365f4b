"""A plan and the sizes of a step become a list of calls on tensors that exist."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ingot.artifacts.bound import Loaded
from ingot.artifacts.eager import function, value
from ingot.artifacts.plan import Entry, Value, Variant
from ingot.ops.dims import contiguous_strides, evaluate
from ingot.ops.library import CALLS


@dataclass(frozen=True)
class BoundPlan:
    """A plan for one step size. Running it reads the inputs that are in `roots` then, and overwrites the results of its last run."""

    calls: tuple[Callable[[], object], ...]
    results: tuple[torch.Tensor, ...]

    def run(self) -> None:
        for call in self.calls:
            call()


_TICKETS = "the tickets"  # no weight's or state's name


def tickets(variants: Sequence[Variant], device: torch.device) -> dict[str, torch.Tensor]:
    """The root that holds the tickets of all `variants`: entries run one after the other, and each leaves zeros to the next."""
    sizes = [{"T": v.max_tokens, "S": v.max_seqs, "R": v.max_rows} for v in variants]
    held = [(v, s) for variant, s in zip(variants, sizes, strict=True) for v in variant.values if v.storage == "tickets"]
    most = max((math.prod(evaluate(d, s) for d in v.shape) for v, s in held), default=0)
    return {_TICKETS: torch.zeros(most, dtype=torch.int32, device=device)}


def bind(
    variant: Variant, sizes: Mapping[str, int], roots: Mapping[str, torch.Tensor], arena: torch.Tensor, kernels: Mapping[str, Loaded], device: torch.device,
    part: slice = slice(None), fixed: dict[str, torch.Tensor] | None = None,
) -> BoundPlan:  # fmt: skip
    """Bind `variant` for a step of these `sizes`. `roots`: inputs (as large as they get), states, weights and `tickets` by name; `arena` is bytes.

    `part`: of the entries, which. `fixed`: weights and states as plans see them, which all plans over the same `roots` can share.
    """
    by_name = {v.name: v for v in variant.values}
    tensors: dict[str, torch.Tensor] = {}
    arenas: dict[str, torch.Tensor] = {}  # by dtype

    shared = tensors if fixed is None else fixed

    def tensor(name: str) -> torch.Tensor:
        value = by_name[name]
        known = shared if value.storage in ("weight", "state") and not value.root else tensors
        if name not in known:
            known[name] = _tensor(value, by_name, sizes, base)
        return known[name]

    def base(root: Value) -> tuple[torch.Tensor, int]:
        """What a root lies in, and at which element."""
        if root.storage == "tickets":
            return roots[_TICKETS], 0
        if root.storage != "arena":
            return roots[root.name], int(roots[root.name].storage_offset())
        if root.dtype not in arenas:
            arenas[root.dtype] = arena.view(getattr(torch, root.dtype))
        # what has no elements may lie behind the end
        return arenas[root.dtype], root.arena_offset // arenas[root.dtype].itemsize if root.arena_offset < arena.numel() else 0

    calls: list[Callable[[], object]] = []
    for entry in variant.entries[part]:
        args = [value(a, tensor, sizes, device) for a in entry.args]
        if entry.backend == "torch":
            calls.append(_eager(entry, args, {k: value(v, tensor, sizes, device) for k, v in entry.kwargs.items()}, [tensor(o) for o in entry.outputs]))
        else:
            grid = tuple(-(-evaluate(g.dim, sizes) // g.block) for g in entry.grid)
            calls.append(kernels[entry.kernel].bind(args, grid))
    return BoundPlan(tuple(calls), tuple(tensor(r) for r in variant.results))


def _tensor(value: Value, values: Mapping[str, Value], sizes: Mapping[str, int], base: Callable[[Value], tuple[torch.Tensor, int]]) -> torch.Tensor:
    shape = [evaluate(d, sizes) for d in value.shape]
    memory, begin = base(values[value.root] if value.root else value)
    strides = contiguous_strides(shape) if value.strides is None else [evaluate(d, sizes) for d in value.strides]
    return memory.as_strided(shape, strides, begin + evaluate(value.offset, sizes))


def _eager(entry: Entry, args: list[Any], kwargs: dict[str, Any], outputs: list[torch.Tensor]) -> Callable[[], object]:
    """A library call, or a reference or aten op whose results are copied to their places."""
    if entry.kernel:
        fn = CALLS[entry.kernel]
        return lambda: fn(*args)
    op = function(entry.target)

    def run() -> None:
        results = op(*args, **kwargs)
        for place, result in zip(outputs, results if isinstance(results, (tuple, list)) else () if results is None else (results,), strict=True):
            place.copy_(result)

    return run
