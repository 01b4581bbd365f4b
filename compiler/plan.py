"""Graph + chosen kernels → Variant: values, entries, and where each value lies in the arena."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ingot.artifacts.eager import constant
from ingot.artifacts.plan import Arg, Entry, Grid, Value, Variant
from ingot.ops import Graph, GraphError
from ingot.ops.dims import Dim, contiguous_strides, evaluate
from ingot.ops.graph import Region, op_of, target_name
from ingot.ops.kernel import Call, Candidate, Operand, Steps, Tickets

from .call import dtype_name
from .outline import Outline, Step

ALIGNMENT = 256


@dataclass(frozen=True)
class Choice:
    """The candidate that computes a call, with its kernels' names in the artifact; None: the call runs under backend "torch"."""

    candidate: Candidate | None
    kernels: tuple[str, ...]
    reason: str


class _Planner:
    """The entries of one plan, and the values that it has beyond the outline's."""

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self.values = dict(outline.values)
        self.entries: list[Entry] = []
        self.inplace: dict[str, str] = {}  # results that may lie where another value does, if that is not needed afterwards

    def _fresh(self, name: str, dtype: str, shape: tuple[Dim, ...], storage: Literal["arena", "tickets"] = "arena") -> str:
        self.values[name] = Value(name, dtype, shape, storage)
        return name

    def torch(self, step: Step, reason: str) -> None:
        self.entries.append(_torch_entry(self.outline.graph, step.node, self.outline.holds, step.outputs, reason))

    def launches(self, step: Step, choice: Choice) -> None:
        node, candidate = step.node, choice.candidate
        assert candidate is not None
        spec = op_of(node)
        scratch = [
            self._fresh(f"{node.name}.scratch{i}", dtype_name(t.dtype), t.shape, "tickets" if isinstance(t, Tickets) else "arena")
            for i, t in enumerate(candidate.scratch)
        ]
        arguments = node.target.arguments if isinstance(node.target, Region) else spec.arguments
        given = {name: node.args[i] for i, name in enumerate(arguments) if i < len(node.args)} | dict(node.kwargs)
        contiguous: dict[str, str] = {}
        apart = {o.arg for launch in candidate.launches for o in launch.operands if o.rows}

        def tensor(arg: str) -> str:
            held = self.outline.holds[given[arg]]
            return held if arg in apart and _has_rows(self.values[held]) else self._contiguous(held, contiguous, node.name, arg)

        def operand(o: Operand) -> Arg:
            view = dtype_name(o.view) if o.view is not None else ""
            if o.pitch is not None:
                return Arg(dim=_pitch(self.values[tensor(o.pitch)]))
            if o.arg is not None:
                return Arg(value=tensor(o.arg), view=view)
            if o.out is not None:
                return Arg(value=step.outputs[o.out], view=view)
            if o.scratch is not None:
                return Arg(value=scratch[o.scratch], view=view)
            return Arg(dim=o.size) if o.size is not None else Arg(const=o.const)

        for launch, kernel in zip(candidate.launches, choice.kernels, strict=True):
            args = tuple(operand(o) for o in launch.operands)
            grid = tuple(Grid(d, b) for d, b in launch.grid)
            written = (*step.outputs, *scratch)
            self.entries.append(Entry(node.name, target_name(node.target), launch.source.backend, args, written, kernel, grid, reason=choice.reason))
        if candidate.inplace is not None:
            self.inplace[step.outputs[0]] = tensor(candidate.inplace)

    def _contiguous(self, held: str, done: dict[str, str], node: str, arg: str) -> str:
        value = self.values[held]
        if value.strides is None and (not value.root or _aligned(value, value.offset, 64)):
            return held
        if held not in done:
            done[held] = self._fresh(f"{node}.{arg}.contiguous", value.dtype, value.shape)
            entry = Entry(node, "aten.clone", "torch", (Arg(value=held),), (done[held],), reason="a kernel reads contiguous rows")
            self.entries.append(entry)
        return done[held]


def _torch_entry(graph: Graph, node: fx.Node, holds: Mapping[fx.Node, Any], outputs: Sequence[str], reason: str = "") -> Entry:
    args = tuple(_arg(graph, a, holds) for a in node.args)
    kwargs = {k: _arg(graph, v, holds) for k, v in node.kwargs.items() if k not in ("layout", "pin_memory", "memory_format")}
    return Entry(node.name, target_name(node.target), "torch", args, tuple(outputs), kwargs=kwargs, reason=reason)


def _arg(graph: Graph, arg: Any, holds: Mapping[fx.Node, Any]) -> Arg:
    if isinstance(arg, fx.Node):
        return Arg(value=holds[arg]) if arg in holds else Arg(dim=graph.dim(arg.meta["val"]))
    if isinstance(arg, (list, tuple)):
        return Arg(items=tuple(_arg(graph, a, holds) for a in arg))
    if isinstance(arg, torch.SymInt):
        return Arg(dim=graph.dim(arg))
    known = constant(arg)
    if known is None:
        raise GraphError(f"an argument of type {type(arg).__name__} ({arg}) has no form in a plan")
    return known


def reference_of(graph: Graph, region: Region) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """A region as torch entries over its arguments, and the names of its results: what its kernel is compared with where there is no graph."""
    nodes = list(region.module.graph.nodes)
    holds = {n: n.name for n in nodes if n.op == "placeholder" or (n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor))}
    entries = tuple(_torch_entry(graph, n, holds, (n.name,)) for n in nodes if n.op == "call_function" and n in holds)
    (returned,) = region.module.graph.output_node().args
    return entries, tuple(n.name for n in (returned if isinstance(returned, (tuple, list)) else (returned,)))  # type: ignore[union-attr]


def _aligned(value: Value, elements: Dim, nbytes: int) -> bool:
    """Whether so many elements of a value are a multiple of `nbytes`."""
    itemsize = getattr(torch, value.dtype).itemsize
    terms = [elements] if isinstance(elements, int) else elements.values()
    return all(t * itemsize % nbytes == 0 for t in terms)


def _pitch(value: Value) -> Dim:
    """Elements from one row to the next."""
    return math.prod(value.shape[1:]) if value.strides is None else value.strides[0]  # type: ignore[arg-type]


def _has_rows(value: Value) -> bool:
    """Whether each row of a value is contiguous, as an operand with `rows` needs it."""
    inner = value.shape[1:]
    if any(isinstance(d, dict) for d in inner) or (value.root and not (_aligned(value, value.offset, 16) and _aligned(value, _pitch(value), 16))):
        return False
    return value.strides is None or value.strides[1:] == contiguous_strides(inner)


def plan(outline: Outline, steps: Steps, name: str, choose: Callable[[Call], Choice], *, capture: tuple[int, ...] = ()) -> Variant:
    """The plan of a graph for `steps`; `choose` names the kernels of each dialect call."""
    planner = _Planner(outline)
    for step in outline.steps:
        choice = choose(step.call) if step.call is not None else Choice(None, (), "no kernel family for aten ops")
        if choice.candidate is None:
            planner.torch(step, choice.reason)
        else:
            planner.launches(step, choice)
    results = outline.results
    values, arena_bytes = place(planner.values, planner.entries, results, steps, planner.inplace)
    used = {*results, *(v for e in planner.entries for v in (*e.outputs, *e.names()))}
    used |= {values[v].root for v in used if values[v].root}
    return Variant(outline.graph.entry_point, name, steps.max_tokens, steps.max_seqs, steps.max_num_new, steps.max_rows, capture,
                   tuple(v for v in values.values() if v.name in used), tuple(planner.entries), results, arena_bytes)  # fmt: skip


def place(values: dict[str, Value], entries: list[Entry], results: tuple[str, ...], steps: Steps, inplace: Mapping[str, str]) -> tuple[dict[str, Value], int]:
    """Arena offsets: a value takes the lowest gap that is free while it lives (first fit over live ranges), sized for the largest step.

    `inplace`: results, and the values that their calls may overwrite; such a result lies there if no one else reads the value then or later.
    """
    sizes = {"T": steps.max_tokens, "S": steps.max_seqs, "R": steps.max_rows}
    uses: dict[str, list[int]] = {}  # of a root: the entries that read or write it, in order, and beyond them the caller

    def use(name: str, i: int) -> None:
        root = values[name].root or name
        if values[root].storage == "arena":
            uses.setdefault(root, []).append(i)

    def overwritten(root: str) -> str | None:
        if (value := values.get(inplace.get(root, ""))) is None:
            return None
        source = value.root or value.name
        alike = (value.dtype, value.shape, value.strides, value.offset) == (values[root].dtype, values[root].shape, None, 0)
        return source if alike and len([i for i in uses.get(source, ()) if i >= uses[root][0]]) == 1 else None

    for i, entry in enumerate(entries):
        for name in (*entry.names(), *entry.outputs):
            use(name, i)
    for name in results:
        use(name, len(entries))

    placed: list[tuple[int, int, str]] = []  # offset, bytes, root
    total = 0
    for root in sorted(uses, key=lambda r: (uses[r][0], r)):
        value = values[root]
        size = getattr(torch, value.dtype).itemsize
        for d in value.shape:
            size *= evaluate(d, sizes)
        size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        source = overwritten(root)
        placed = [p for p in placed if uses[p[2]][-1] >= uses[root][0] and p[2] != source]
        offset = _lowest_gap(placed, size) if source is None else values[source].arena_offset
        placed.append((offset, size, root))
        total = max(total, offset + size)
        values[root] = Value(root, value.dtype, value.shape, "arena", arena_offset=offset)
    return values, total


def _lowest_gap(placed: list[tuple[int, int, str]], size: int) -> int:
    offset = 0
    for other_offset, other_size, _ in sorted(placed):
        if offset + size <= other_offset:
            break
        offset = max(offset, other_offset + other_size)
    return offset
