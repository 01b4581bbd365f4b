"""Kernels for regions: the pointwise and row-reducing remains of a model that are no dialect op.

A region is decomposed into some thirty primitives, which become a `Program` over a space [rows, columns]: columns are the
last dim of its broadcast shape, rows all others. A value varies along rows, columns, both or neither; a reduction runs
along columns. `region_triton` and `region_tvm` write it down for a GPU and a CPU. All arithmetic is float32: where the
region rounds between two steps, the kernel does not.

Torch's Inductor would claim more, but what it generates cannot be kept: its C++ needs libtorch (Sleef, `at::vec`) of one
version, its Triton imports torch's run-time helpers, and it writes Triton only where a GPU is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ingot.ops.dims import Dim, product
from ingot.ops.graph import Region
from ingot.ops.kernel import Call, Tensor

from .decompositions import DECOMPOSITIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_aten = torch.ops.aten


def _overloads(names: str, *kinds: str) -> dict[Any, str]:
    return {getattr(getattr(_aten, name), kind): name for name in names.split() for kind in kinds}


PRIMITIVES: dict[Any, str] = {
    **_overloads("neg abs reciprocal sqrt rsqrt exp log sin cos tanh sigmoid erf relu floor maximum minimum", "default"),
    **_overloads("add sub mul div", "Tensor", "Scalar"),
    **_overloads("gt ge lt le eq ne", "Tensor", "Scalar"),
    **_overloads("logical_and logical_or logical_not", "default"),
    _aten.bitwise_and.Tensor: "logical_and",
    _aten.bitwise_or.Tensor: "logical_or",
    _aten.bitwise_not.default: "logical_not",
    _aten.where.self: "where",
}
BOOLEAN = frozenset(("gt", "ge", "lt", "le", "eq", "ne", "logical_and", "logical_or", "logical_not"))
REDUCTIONS: dict[Any, str] = {_aten.sum.dim_IntList: "sum", _aten.mean.dim: "mean", _aten.amax.default: "max", _aten.amin.default: "min"}
_SAME = (_aten.clone.default, _aten.alias.default, _aten.detach.default, _aten.expand.default)
_CAST = (_aten._to_copy.default, torch.ops.prims.convert_element_type.default)


class UnclaimedError(Exception):
    """Why these kernels do not compute a region; caught by those who ask."""


@dataclass(frozen=True, eq=False)
class Value:
    """A step of a program: a "load" of a region's argument, one of PRIMITIVES on earlier values and constants, or one of REDUCTIONS."""

    op: str
    args: tuple[Value | float, ...]
    rows: bool  # whether it varies along rows
    cols: bool
    level: int = 0  # how many reductions must be done before it
    boolean: bool = False
    source: str = ""  # of a load
    tensor: Tensor | None = None  # of a load


@dataclass(frozen=True)
class Program:
    """`shape` [*lead, C] is what everything broadcasts to. An output has this shape, or [*lead, 1], or [*lead]."""

    shape: tuple[Dim, ...]
    values: tuple[Value, ...]
    outputs: tuple[Value, ...]
    results: tuple[Tensor, ...]

    @property
    def width(self) -> int:
        """C."""
        assert isinstance(self.shape[-1], int)
        return self.shape[-1]

    @property
    def rows(self) -> Dim:
        """Product of the leading sizes."""
        count: Dim = 1
        for d in self.shape[:-1]:
            count = product(count, d)
        return count

    @property
    def loads(self) -> list[Value]:
        return [v for v in self.values if v.op == "load"]

    @property
    def levels(self) -> int:
        """How often the columns are gone through to reduce them."""
        return max((v.level for v in self.values if is_reduction(v)), default=-1) + 1

    def index(self, shape: tuple[Dim, ...], row: str, col: str) -> list[str]:
        """An index for each dim of a tensor of `shape` that broadcasts to the program's, at row number `row`."""
        missing = len(self.shape) - len(shape)
        return ["0" if n == 1 else col if d + missing == len(self.shape) - 1 else self._lead(d + missing, row) for d, n in enumerate(shape)]

    def _lead(self, d: int, row: str) -> str:
        inner = 1
        for n in self.shape[d + 1 : -1]:
            assert isinstance(n, int)  # `parse` lets only the outermost size be symbolic
            inner *= n
        index = row if inner == 1 else f"{row} // {inner}"
        return index if all(n == 1 for n in self.shape[:d]) else f"{index} % {self.shape[d]}"


def is_reduction(value: Value) -> bool:
    """Whether a value comes from all columns of a row."""
    return value.op in REDUCTIONS.values()


def parse(region: Region, call: Call) -> Program:
    """The program of a region, called with arguments and results as `call` says. UnclaimedError if it is more than that."""
    nodes = [n for n in region.module.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta["val"] for n in nodes]
    if not all(isinstance(f, torch.Tensor) and f.dtype in FLOATS for f in fakes):
        raise UnclaimedError("an argument is not a tensor of floats")
    with fakes[0].fake_mode:
        # equal values may share a fake tensor, which tracing would take for one argument
        fakes = [torch.empty_strided(f.shape, f.stride(), dtype=f.dtype) for f in fakes]
        graph = make_fx(region, decomposition_table=DECOMPOSITIONS, tracing_mode="real")(*fakes).graph
    symbols = {str(s): d for f, n in zip(fakes, nodes, strict=True) for s, d in zip(f.shape, call.args[n.name].shape, strict=True)}
    graph.eliminate_dead_code()
    return _Parser(graph, [n.name for n in nodes], call, symbols).run()


@dataclass
class _Parser:
    graph: fx.Graph
    arguments: list[str]
    call: Call
    symbols: dict[str, Dim]
    made: list[Value] = field(default_factory=list)

    def run(self) -> Program:
        self.shape = self._broadcast()
        if not isinstance(self.shape[-1], int):
            raise UnclaimedError("its rows have no fixed width")
        outermost = next((d for d, n in enumerate(self.shape) if n != 1), 0)
        if any(not isinstance(n, int) for n in self.shape[outermost + 1 :]):
            raise UnclaimedError("a size that is not the outermost is known only when it runs")
        values: dict[fx.Node, Value | float] = {}
        arguments = iter(self.arguments)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = self._load(next(arguments))
            elif node.op == "call_function" and not isinstance(node.meta["val"], torch.SymInt):
                values[node] = self._step(node, values)
            elif node.op not in ("call_function", "output"):
                raise UnclaimedError(f"it holds a {node.op}")
        returned = self.graph.output_node().args[0]
        outputs = [values[n] for n in (returned if isinstance(returned, (tuple, list)) else (returned,))]  # type: ignore[index]
        for output, result in zip(outputs, self.call.results, strict=True):
            self._check_output(output, result)
        return Program(self.shape, tuple(self.made), tuple(outputs), self.call.results)  # type: ignore[arg-type]

    def _broadcast(self) -> tuple[Dim, ...]:
        shape: list[Dim] = []
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if node.op == "output" or isinstance(value, torch.SymInt) or _drops_dim(node):
                continue
            if not isinstance(value, torch.Tensor):
                raise UnclaimedError(f"{node.target} does not give one tensor")
            own = [self._dim(n) for n in value.shape]
            shape = [1] * (len(own) - len(shape)) + shape
            for d, n in enumerate(own, len(shape) - len(own)):
                if shape[d] == 1:
                    shape[d] = n
                elif n not in (1, shape[d]):
                    raise UnclaimedError(f"sizes {shape[d]} and {n} meet")
        return tuple(shape) or (1,)

    def _dim(self, size: int | torch.SymInt) -> Dim:
        if isinstance(size, int):
            return size
        if str(size) not in self.symbols:
            raise UnclaimedError(f"size {size} is no argument's")
        return self.symbols[str(size)]

    def _varies(self, shape: tuple[Dim, ...]) -> tuple[bool, bool]:
        return any(n != 1 for n in shape[:-1]), bool(shape) and shape[-1] != 1

    def _load(self, name: str) -> Value:
        tensor = self.call.args[name]
        return self._made(Value("load", (), *self._varies(tensor.shape), source=name, tensor=tensor))

    def _made(self, value: Value) -> Value:
        self.made.append(value)
        return value

    def _step(self, node: fx.Node, values: dict[fx.Node, Value | float]) -> Value | float:
        target, meta = node.target, node.meta["val"]
        if meta.dtype not in (*FLOATS, torch.bool):
            raise UnclaimedError(f"{target} gives {meta.dtype}")
        if target is _aten.scalar_tensor.default or (target is _aten.full.default and meta.dim() == 0):
            return float(node.args[-1])  # type: ignore[arg-type]
        if target is _aten.new_zeros.default and meta.dim() == 0:
            return 0.0
        args = tuple(values.get(a) if isinstance(a, fx.Node) else a for a in node.args)
        first = args[0] if args else None
        if isinstance(first, Value) and any(_drops_dim(a) for a in node.all_input_nodes) and not _adds_last_dim(node):
            raise UnclaimedError("a reduced dim is used without being put back")
        if target in _SAME or _adds_last_dim(node):
            return first  # type: ignore[return-value]
        if target in _CAST and isinstance(first, Value):
            if first.boolean and meta.dtype != torch.bool:
                return self._value("where", (first, 1.0, 0.0))
            if not first.boolean and meta.dtype == torch.bool:
                return self._value("ne", (first, 0.0))
            return first
        if target in REDUCTIONS and isinstance(first, Value):
            return self._reduce(node, first)
        if target not in PRIMITIVES:
            raise UnclaimedError(f"{target} is no primitive")
        if not all(isinstance(a, (Value, int, float)) for a in args):
            raise UnclaimedError(f"{target} has an argument that is neither a tensor nor a number")
        name = PRIMITIVES[target]
        alpha = node.kwargs.get("alpha", 1)
        operands = [a if isinstance(a, Value) else float(a) for a in args]  # type: ignore[arg-type]
        if alpha != 1:
            operands[1] = self._value("mul", (operands[1], float(alpha)))  # type: ignore[arg-type]
        if name not in ("where", "logical_and", "logical_or", "logical_not") and any(isinstance(a, Value) and a.boolean for a in operands):
            raise UnclaimedError(f"{target} computes with booleans")
        return self._value(name, tuple(operands))

    def _value(self, op: str, args: tuple[Value | float, ...]) -> Value:
        inputs = [a for a in args if isinstance(a, Value)]
        if not inputs:
            raise UnclaimedError(f"{op} of constants")
        level = max(a.level + is_reduction(a) for a in inputs)
        return self._made(Value(op, args, any(a.rows for a in inputs), any(a.cols for a in inputs), level, boolean=op in BOOLEAN))

    def _reduce(self, node: fx.Node, x: Value) -> Value:
        dims = [d % node.args[0].meta["val"].dim() for d in (node.args[1] if len(node.args) > 1 else [])]  # type: ignore[union-attr]
        if dims != [node.args[0].meta["val"].dim() - 1] or x.boolean or not x.cols:  # type: ignore[union-attr]
            raise UnclaimedError(f"{node.target} is not over the last dim alone")
        return self._made(Value(REDUCTIONS[node.target], (x,), x.rows, False, x.level + is_reduction(x)))

    def _check_output(self, output: Value | float, result: Tensor) -> None:
        if not isinstance(output, Value) or output.boolean or result.dtype not in FLOATS:
            raise UnclaimedError("a result is not a tensor of floats")
        if result.shape not in (self.shape, (*self.shape[:-1], 1), self.shape[:-1]) or (result.shape == self.shape[:-1] and output.cols):
            raise UnclaimedError("a result does not have the region's shape")


def _drops_dim(node: fx.Node) -> bool:
    """Whether a node is a reduction that takes its dim away: its shape is then aligned with no other."""
    if node.target not in REDUCTIONS:
        return False
    return not (node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))


def _adds_last_dim(node: fx.Node) -> bool:
    return node.target is _aten.unsqueeze.default and node.args[1] in (-1, node.meta["val"].dim() - 1) and _drops_dim(node.args[0])  # type: ignore[arg-type]
