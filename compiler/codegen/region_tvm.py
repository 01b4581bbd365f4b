"""A region's program as TVMScript: a task a row, which is gone through once for each level of reductions and once to be written."""

from __future__ import annotations

from collections.abc import Collection
from textwrap import indent

from ingot.ops.dims import Dim
from ingot.ops.kernel import Call, Candidate, Launch, Operand, Source, Steps
from ingot.ops.target import Target
from ingot.ops.tvm.vector import DTYPES, Vectors, row_element

from .region_program import Program, Value, is_reduction

_TILE = 4096
"""Columns of a task, where rows are long and nothing is reduced."""
_PARALLEL = 1 << 15
"""Elements from which on threads are worth waking."""

_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_FUNCTIONS = frozenset(("exp", "sigmoid", "tanh", "erf", "relu"))  # of `ops.tvm.vector`
_START = {"sum": 0.0, "mean": 0.0, "max": -float("inf"), "min": -float("inf")}


def candidates(program: Program, call: Call, steps: Steps, target: Target, apart: Collection[str] = ()) -> list[Candidate]:
    """The program's one kernel. `apart`: arguments whose rows may lie apart."""
    loads = list(dict.fromkeys(v.source for v in program.loads))
    operands = [Operand(arg=n, rows=n in apart) for n in loads] + [Operand(out=i) for i in range(len(program.results))]
    text = _Script(program, call, steps, Vectors(target), loads, apart).text()
    return [Candidate("region", (Launch(Source("region", "tvm", "region", text), tuple(operands)),))]


class _Script:
    def __init__(self, program: Program, call: Call, steps: Steps, vectors: Vectors, loads: list[str], apart: Collection[str]) -> None:
        self.program, self.v, self.loads, self.call, self.apart = program, vectors, loads, call, apart
        self.parallel = "T.parallel" if steps.bound(program.rows) * program.width >= _PARALLEL else "T.serial"
        self.names = {value: f"v{i}" for i, value in enumerate(program.values)}
        self.passes = 0
        self.sizes: dict[str, str] = {}  # by the form of a symbolic size

    def text(self) -> str:
        program = self.program
        buffers = [(n, DTYPES[self.call.args[n].dtype], self._shape(self.call.args[n].shape)) for n in self.loads]
        buffers += [(f"out{i}", DTYPES[t.dtype], self._shape(t.shape)) for i, t in enumerate(program.results)]
        rows = " * ".join(str(d) for d in self._shape(program.shape[:-1]) if d != 1) or "1"
        tiles = 1 if program.levels else -(-program.width // _TILE)
        body = self._tiled(rows, tiles) if tiles > 1 else self._by_row(rows)
        return self.v.script("region", buffers, body, apart=[n for n in self.loads if n in self.apart])

    def _shape(self, shape: tuple[Dim, ...]) -> tuple[int | str, ...]:
        return tuple(d if isinstance(d, int) else self.sizes.setdefault(str(sorted(d.items())), f"size{len(self.sizes)}") for d in shape)

    def _by_row(self, rows: str) -> str:
        lines = [*self._row_values(0)]
        for level in range(self.program.levels):
            reductions = [v for v in self.program.values if is_reduction(v) and v.level == level]
            for value in reductions:
                lines += [
                    f'{self._sum(value)} = T.alloc_buffer((1,), "{self.v.type}", scope="global")',
                    f"{self._sum(value)}[0] = {self._constant(_START[value.op])}",
                ]
            lines.append(self.v.over(self.program.width, lambda c, n, r=reductions: self._accumulate(r, c, n), 0))
            lines += [f"{self.names[v]}: T.let = {self._total(v)}" for v in reductions]
            lines += self._row_values(level + 1)
        lines += self._store_row_outputs()
        if any(r.shape == self.program.shape for r in self.program.results):
            lines.append(self.v.over(self.program.width, self._write, 0))
        return f"for row in {self.parallel}({rows}):\n" + indent("\n".join(lines), "    ")

    def _tiled(self, rows: str, tiles: int) -> str:
        lanes, width = self.v.lanes, self.program.width
        whole, rest = width // lanes * lanes, width % lanes
        lines = [f"row: T.let = task // {tiles}", f"first: T.let = task % {tiles} * {_TILE}", *self._row_values(0)]
        lines.append(f"for k in T.serial(T.min({_TILE}, {whole} - first) // {lanes}):")
        lines += [f"    {line}" for line in self._write(f"first + k * {lanes}", None)]
        if rest:
            lines += [f"if first + {_TILE} > {whole}:", *(f"    {line}" for line in self._write(str(whole), str(rest)))]
        return f"for task in {self.parallel}({rows} * {tiles}):\n" + indent("\n".join(lines), "    ")

    def _row_values(self, level: int) -> list[str]:
        """Values of `level` that are the same in all columns, each a vector with one number in all lanes."""
        values = [v for v in self.program.values if not v.cols and not is_reduction(v) and v.level == level]
        return [f"{self.names[v]}: T.let = {self._expression(v, '0', None)}" for v in values]

    def _column_values(self, wanted: list[Value], col: str, count: str | None) -> list[str]:
        """Statements that compute `wanted`, and what they are made of, for the columns from `col` on."""
        needed: set[Value] = set()
        waiting = [v for v in wanted if v.cols]
        while waiting:
            value = waiting.pop()
            if value not in needed:
                needed.add(value)
                waiting += [a for a in value.args if isinstance(a, Value) and a.cols]
        self.passes += 1
        lines = []
        for i, value in enumerate(self.program.values):
            if value in needed:
                self.names[value] = f"v{i}_{self.passes}"  # a name is bound once in a row, and the last part of a row is no scope of its own
                lines.append(f"{self.names[value]}: T.let = {self._expression(value, col, count)}")
        return lines

    def _accumulate(self, reductions: list[Value], col: str, count: str | None) -> list[str]:
        lines = self._column_values([v.args[0] for v in reductions if isinstance(v.args[0], Value)], col, count)
        for value in reductions:
            x = self._name(value.args[0])
            x = f"{self._constant(0.0)} - {x}" if value.op == "min" else x
            if count is not None:
                x = f"T.Select(T.Ramp(0, 1, {self.v.lanes}) < T.broadcast({count}, {self.v.lanes}), {x}, {self._constant(_START[value.op])})"
            total = f"{self._sum(value)}[0]"
            lines.append(f"{total} = {f'T.max({total}, {x})' if value.op in ('max', 'min') else f'{total} + {x}'}")
        return lines

    def _total(self, value: Value) -> str:
        reduce = self.v.max if value.op in ("max", "min") else self.v.sum
        total = reduce(f"{self._sum(value)}[0]")
        total = {"mean": f"{total} / T.float32({self.program.width})", "min": f"T.float32(0) - {total}"}.get(value.op, total)
        return self.v.splat(total)

    def _sum(self, value: Value) -> str:
        return f"{self.names[value]}_total"

    def _write(self, col: str, count: str | None) -> list[str]:
        outputs = [(i, v) for i, (v, r) in enumerate(zip(self.program.outputs, self.program.results, strict=True)) if r.shape == self.program.shape]
        lines = self._column_values([v for _, v in outputs], col, count)
        for i, value in outputs:
            result = self.program.results[i]
            lines.append(self.v.store(DTYPES[result.dtype], self._element(f"out{i}", result.shape, col), self.names[value], count))
        return lines

    def _store_row_outputs(self) -> list[str]:
        rows = [(i, v, r) for i, (v, r) in enumerate(zip(self.program.outputs, self.program.results, strict=True)) if r.shape != self.program.shape]
        return [self.v.store(DTYPES[r.dtype], self._element(f"out{i}", r.shape, "0"), self.names[v], "1") for i, v, r in rows]

    def _element(self, name: str, shape: tuple[Dim, ...], col: str) -> str:
        if shape == self.program.shape[:-1]:  # its last dim was reduced away
            shape = (*shape, 1)
            return f"{name}[{', '.join(self.program.index(shape, 'row', col)[:-1]) or '()'}]"
        return f"{name}[{', '.join(self.program.index(shape, 'row', col)) or '()'}]"

    def _name(self, value: Value | float) -> str:
        return self.names[value] if isinstance(value, Value) else self._constant(value)

    def _constant(self, x: float) -> str:
        return self.v.splat(x if abs(x) != float("inf") else f'T.float32("{x}")')

    def _expression(self, value: Value, col: str, count: str | None) -> str:
        """A vector; booleans are 1 and 0, which LLVM sees through."""
        if value.op == "load":
            assert value.tensor is not None
            indices, dtype = self.program.index(value.tensor.shape, "row", col), DTYPES[value.tensor.dtype]
            element = row_element(value.source, value.tensor, indices) if value.source in self.apart else f"{value.source}[{', '.join(indices) or '()'}]"
            return self.v.load(dtype, element, count) if value.cols else self.v.splat(self.v.load_one(dtype, element))
        args = [self._name(a) for a in value.args]
        one, zero = self._constant(1.0), self._constant(0.0)
        if value.op in _OPERATORS:
            result = f"{args[0]} {_OPERATORS[value.op]} {args[1]}"
            return f"T.Select({result}, {one}, {zero})" if value.boolean else result
        if value.op in _FUNCTIONS:
            return self.v.call(value.op, *args)
        match value.op:
            case "neg":
                return f"{zero} - {args[0]}"
            case "reciprocal":
                return f"{one} / {args[0]}"
            case "rsqrt":
                return f"{one} / T.sqrt({args[0]})"
            case "maximum" | "minimum":
                return f"T.{value.op[:3]}({args[0]}, {args[1]})"
            case "logical_and":
                return f"{args[0]} * {args[1]}"
            case "logical_or":
                return f"T.max({args[0]}, {args[1]})"
            case "logical_not":
                return f"{one} - {args[0]}"
            case "where":
                return f"T.Select({args[0]} != {zero}, {args[1]}, {args[2]})"
        return f"T.{value.op}({args[0]})"  # abs, sqrt, log, sin, cos, floor
