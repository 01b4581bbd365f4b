"""Graph + chosen kernels → Variant: values, entries, and where each value lies in the arena."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ingot.artifacts.eager import constant
from ingot.artifacts.plan import Arg, Entry, Grid, Value, Variant
from ingot.ops import Graph, GraphError
from ingot.ops.dims import Dim, evaluate
from ingot.ops.graph import Region, op_of, states_of, target_name
from ingot.ops.kernel import Call, Candidate, Operand, Steps, Tensor

ALIGNMENT = 256


@dataclass(frozen=True)
class Choice:
    """The candidate that computes a call, with its kernels' names in the artifact; None: the call runs under backend "torch"."""

    candidate: Candidate | None
    kernels: tuple[str, ...]
    reason: str


def call_of(graph: Graph, node: fx.Node) -> Call | None:
    """A call of a dialect op or a region as kernel families see it; None for anything else."""
    if isinstance(node.target, Region):
        return region_call(graph, node.target, node.args, node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]])  # type: ignore[arg-type]
    spec = op_of(node)
    if spec is None:
        return None
    args: dict[str, Any] = {}
    for i, argument in enumerate(spec.overload._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        args[argument.name] = tensor_type(graph, value) if isinstance(value, fx.Node) else value
    results = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
    results = results[: len(results) - len(spec.states)]
    return Call(spec.name, args, tuple(_type(graph, r) for r in results))


def region_call(graph: Graph, region: Region, inputs: Sequence[fx.Node], results: Sequence[torch.Tensor]) -> Call:
    """A call of a region with nodes as inputs and results like these."""
    args = {n: tensor_type(graph, i) for n, i in zip(region.arguments, inputs, strict=True)}
    return Call(region.name, args, tuple(_type(graph, r) for r in results), region)


def tensor_type(graph: Graph, node: fx.Node) -> Any:
    value = node.meta["val"]
    return _type(graph, value) if isinstance(value, torch.Tensor) else graph.dim(value)


def _type(graph: Graph, value: torch.Tensor) -> Tensor:
    return Tensor(value.dtype, tuple(graph.dim(s) for s in value.shape))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class _Planner:
    graph: Graph
    steps: Steps
    choose: Callable[[fx.Node, Call], Choice]
    values: dict[str, Value] = field(default_factory=dict)
    holds: dict[fx.Node, Any] = field(default_factory=dict)  # node → value name, or a list of them
    fakes: dict[fx.Node, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def placeholder(self, node: fx.Node) -> None:
        fake = node.meta["val"]
        storage = "input" if node.name in self.graph.inputs else "state" if node.name in self.graph.states else "weight"
        self.values[node.name] = Value(node.name, dtype_name(fake.dtype), self.graph.shape(node), storage)  # type: ignore[arg-type]
        self.holds[node], self.fakes[node] = node.name, fake

    def fresh(self, name: str, dtype: torch.dtype, shape: tuple[Dim, ...]) -> str:
        self.values[name] = Value(name, dtype_name(dtype), shape, "arena")
        return name

    def view(self, name: str, fake: torch.Tensor, of: str) -> str:
        source = self.values[of]
        self.values[name] = Value(
            name,
            dtype_name(fake.dtype),
            tuple(self.graph.dim(s) for s in fake.shape),
            source.storage,
            root=source.root or source.name,
            strides=None if fake.is_contiguous() else tuple(self.graph.dim(s) for s in fake.stride()),
            offset=self.graph.dim(fake.storage_offset()),
        )
        return name

    def call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            self.holds[node] = self.holds[node.args[0]][node.args[1]]
            self.fakes[node] = self.fakes[node.args[0]][node.args[1]]
            return
        if not isinstance(node.meta["val"], (torch.Tensor, tuple, list)):
            return  # a size: its users read it from the fake value
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.fakes[n] if n in self.fakes else n.meta["val"])
        with self.graph.fake_mode:
            fake = node.target(*args, **kwargs)
        if self._alias(node, fake):
            return
        call = call_of(self.graph, node)
        choice = self.choose(node, call) if call is not None else Choice(None, (), "no kernel family for aten ops")
        outputs = self._outputs(node, fake)
        if choice.candidate is None:
            self._torch_entry(node, outputs, choice.reason)
        else:
            assert call is not None
            self._launches(node, choice, outputs)

    def _alias(self, node: fx.Node, fake: Any) -> bool:
        """Whether every result shares the storage of an argument: then a view is all it takes."""
        results = fake if isinstance(fake, (tuple, list)) else [fake]
        sources = [n for n in node.all_input_nodes if n in self.fakes and isinstance(self.fakes[n], torch.Tensor)]
        if op_of(node) is not None:
            return False
        names = []
        for i, result in enumerate(results):
            source = next((n for n in sources if torch._C._is_alias_of(result, self.fakes[n])), None)
            if source is None:
                return False
            names.append(self.view(node.name if len(results) == 1 else f"{node.name}.{i}", result, self.holds[source]))
        self.holds[node] = names if isinstance(fake, (tuple, list)) else names[0]
        self.fakes[node] = fake
        return True

    def _outputs(self, node: fx.Node, fake: Any) -> list[str]:
        """Arena values for the results; a state that comes back is the state that went in."""
        results = list(fake) if isinstance(fake, (tuple, list)) else [fake]
        given = states_of(node)
        states = [None if n is None else self.holds[n] for n in given]
        names, fakes = [], []
        for i, result in enumerate(results[: len(results) - len(states)]):
            name = self.fresh(node.name if len(results) == 1 else f"{node.name}.{i}", result.dtype, tuple(self.graph.dim(s) for s in result.shape))
            names.append(name)
            with self.graph.fake_mode:
                fakes.append(torch.empty(result.shape, dtype=result.dtype))
        held, fake_held = [*names, *states], [*fakes, *(None if n is None else self.fakes[n] for n in given)]
        single = not isinstance(fake, (tuple, list))
        self.holds[node], self.fakes[node] = (held[0], fake_held[0]) if single else (held, fake_held)
        return names

    def _torch_entry(self, node: fx.Node, outputs: list[str], reason: str) -> None:
        self.entries.append(_torch_entry(self.graph, node, self.holds, outputs, reason))

    def _launches(self, node: fx.Node, choice: Choice, outputs: list[str]) -> None:
        candidate = choice.candidate
        assert candidate is not None
        spec = op_of(node)
        scratch = [self.fresh(f"{node.name}.scratch{i}", t.dtype, t.shape) for i, t in enumerate(candidate.scratch)]
        arguments = node.target.arguments if isinstance(node.target, Region) else spec.arguments
        given = {name: node.args[i] for i, name in enumerate(arguments) if i < len(node.args)} | dict(node.kwargs)
        contiguous: dict[str, str] = {}

        def operand(o: Operand) -> Arg:
            view = dtype_name(o.view) if o.view is not None else ""
            if o.arg is not None:
                return Arg(value=self._contiguous(given[o.arg], contiguous, f"{node.name}.{o.arg}"), view=view)
            if o.out is not None:
                return Arg(value=outputs[o.out], view=view)
            if o.scratch is not None:
                return Arg(value=scratch[o.scratch], view=view)
            return Arg(dim=o.size) if o.size is not None else Arg(const=o.const)

        for launch, kernel in zip(candidate.launches, choice.kernels, strict=True):
            args = tuple(operand(o) for o in launch.operands)
            grid = tuple(Grid(d, b) for d, b in launch.grid)
            written = (*outputs, *scratch)
            self.entries.append(Entry(node.name, target_name(node.target), launch.source.backend, args, written, kernel, grid, reason=choice.reason))

    def _contiguous(self, node: fx.Node, done: dict[str, str], name: str) -> str:
        held = self.holds[node]
        value = self.values[held]
        if value.strides is None and (not value.root or _aligned(value)):
            return held
        if held not in done:
            done[held] = self.fresh(f"{name}.contiguous", self.fakes[node].dtype, value.shape)
            self.entries.append(Entry(node.name, "aten.clone", "torch", (Arg(value=held),), (done[held],), reason="a kernel reads contiguous rows"))
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


def _aligned(value: Value) -> bool:
    itemsize = getattr(torch, value.dtype).itemsize
    terms = [value.offset] if isinstance(value.offset, int) else value.offset.values()
    return all(t * itemsize % 64 == 0 for t in terms)


def plan(graph: Graph, steps: Steps, name: str, choose: Callable[[fx.Node, Call], Choice], *, capture: bool = False) -> Variant:
    """The plan of `graph` for `steps`; `choose` names the kernels of each dialect call."""
    planner = _Planner(graph, steps, choose)
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            planner.placeholder(node)
        elif node.op == "call_function":
            planner.call(node)
    results = tuple(planner.holds[n] for n in graph.fx.output_node().args[0][: graph.num_results])
    values, arena_bytes = place(planner.values, planner.entries, results, steps)
    used = {*results, *(o for e in planner.entries for o in e.outputs)}
    used |= {v for e in planner.entries for a in (*e.args, *e.kwargs.values()) for v in a.names()}
    used |= {values[v].root for v in used if values[v].root}
    return Variant("forward", name, steps.max_tokens, steps.max_seqs, steps.max_num_new, steps.max_rows, capture,
                   tuple(v for v in values.values() if v.name in used), tuple(planner.entries), results, arena_bytes)  # fmt: skip


def place(values: dict[str, Value], entries: list[Entry], results: tuple[str, ...], steps: Steps) -> tuple[dict[str, Value], int]:
    """Arena offsets: a value takes the lowest gap that is free while it lives (first fit over live ranges), sized for the largest step."""
    sizes = {"T": steps.max_tokens, "S": steps.max_seqs, "R": steps.max_rows}
    begin: dict[str, int] = {}
    end: dict[str, int] = {}

    def touch(name: str, i: int) -> None:
        root = values[name].root or name
        if values[root].storage == "arena":
            begin.setdefault(root, i)
            end[root] = i

    for i, entry in enumerate(entries):
        for arg in (*entry.args, *entry.kwargs.values()):
            for name in arg.names():
                touch(name, i)
        for name in entry.outputs:
            touch(name, i)
    for name in results:
        touch(name, len(entries))

    placed: list[tuple[int, int, str]] = []  # offset, bytes, root
    total = 0
    for root in sorted(begin, key=lambda r: (begin[r], r)):
        value = values[root]
        size = getattr(torch, value.dtype).itemsize
        for d in value.shape:
            size *= evaluate(d, sizes)
        size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        placed = [p for p in placed if end[p[2]] >= begin[root]]
        offset = 0
        for other_offset, other_size, _ in sorted(placed):
            if offset + size <= other_offset:
                break
            offset = max(offset, other_offset + other_size)
        placed.append((offset, size, root))
        total = max(total, offset + size)
        values[root] = Value(root, value.dtype, value.shape, "arena", arena_offset=offset)
    return values, total
