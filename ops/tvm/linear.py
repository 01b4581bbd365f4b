"""Linear layers for a few rows: the weight [N, K], as the checkpoint has it, is read once, at memory bandwidth.

A task makes eight columns. It takes the weight rows behind them by fours, and these meet all rows of x while they
lie in the first cache: rows of x by fours, the rest one by one, each product a vector of partial sums that is reduced at
the end of K. Larger T is oneDNN's (the claimants of `ops/library.py`), over the same weight, unless steps are deterministic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from textwrap import indent

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .vector import BYTES, DTYPES, Buffer, Vectors, numbers

MAX_ROWS = 16
GROUP = 4
"""Rows of x, and rows of the weight, that are multiplied together: 16 accumulators."""
COLUMNS = 8
"""Columns of a result that a task makes."""
PREFETCH_BYTES = 32 << 10
"""How far ahead of their use weights are asked for. The rows that are read together are streams too short for the hardware's
prefetcher: on Zen 4 this doubles the bandwidth of K = 1024, and reaches that of a plain read."""


@claims("linear", "tvm")
def linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, target, [n for n in ("bias",) if call.args[n] is not None])


@claims("linear_add", "tvm")
def linear_add(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, target, [n for n in ("bias", "residual") if call.args[n] is not None])


@claims("linear_glu", "tvm")
def linear_glu(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, target, [])


@claims("head_linear", "tvm")
def head_linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, target, [])


def _candidates(call: Call, steps: Steps, target: Target, addends: list[str]) -> list[Candidate]:
    x, weight = call.args["x"], call.args["weight"]
    tensors = [x, weight, *(call.args[a] for a in addends)]
    most_rows = steps.bound(x.shape[0])
    if len(x.shape) != len(weight.shape) or x.dtype not in DTYPES or any(t.dtype != x.dtype for t in tensors):
        return []
    if most_rows > MAX_ROWS and not steps.deterministic:
        return []
    if math.prod(numbers(weight.shape)) >= 1 << 31:  # indices are int32
        return []
    text = _script(Vectors(target), call, most_rows, addends)
    operands = [Operand(arg=a) for a in ("x", "weight", *addends)] + [Operand(out=0)]
    return [Candidate("stream", (Launch(Source(call.op, "tvm", call.op, text), tuple(operands)),))]


def _script(v: Vectors, call: Call, max_rows: int, addends: list[str]) -> str:
    weight: Tensor = call.args["weight"]
    dtype = DTYPES[weight.dtype]
    (*heads, n, k), act = numbers(weight.shape), call.args.get("act")
    columns = n // 2 if act else n
    tile = Tile(v, dtype, k, columns, ("gate", "up") if act else ("sums",))
    if heads:
        tile = replace(tile, x_row="base + t + m, head", weight_row="head, {}")

    results = [v.load("float32", f"{name}[t * {COLUMNS}]", str(COLUMNS)) for name in tile.sums]
    result = f"{v.call(act, results[0])} * {results[1]}" if act else results[0]
    count = f"T.min({columns} - first, {COLUMNS})" if columns % COLUMNS else str(COLUMNS)
    for addend in addends:
        result += f" + {v.load(dtype, 'bias[first]' if addend == 'bias' else 'residual[base + t, first]', count)}"

    held = min(max_rows, MAX_ROWS)
    allocated = "\n".join(f'{name} = T.alloc_buffer(({held * COLUMNS},), "float32", scope="global")' for name in tile.sums)
    by_group = f"for group in T.serial(height // {GROUP}):\n{tile(GROUP, f'group * {GROUP}')}"
    tasks = -(-columns // COLUMNS)
    body = f"""
for task in T.parallel({math.prod(heads) * tasks}):
{f"    head: T.let = task // {tasks}" if heads else ""}
    first: T.let = task{f" % {tasks}" if heads else ""} * {COLUMNS}
    for block in T.serial({f"(rows + {MAX_ROWS - 1}) // {MAX_ROWS}" if max_rows > MAX_ROWS else "1"}):
        base: T.let = block * {MAX_ROWS}
        height: T.let = T.min(rows - base, {MAX_ROWS})
{indent(allocated, "        ")}
        for part in T.serial({COLUMNS // tile.width}):
{indent(by_group, "            ") if max_rows >= GROUP else ""}
            for single in T.serial(height % {GROUP}):
{indent(tile(1, f"height // {GROUP} * {GROUP} + single"), "            ")}
        for t in T.serial(height):
            {v.store(dtype, "y[base + t, head, first]" if heads else "y[base + t, first]", result, count)}
"""
    shapes = {"bias": (columns,), "residual": ("rows", columns)}
    buffers: list[Buffer] = [
        ("x", dtype, ("rows", *heads, k)),
        ("weight", dtype, (*heads, n, k)),
        *((a, dtype, shapes[a]) for a in addends),
        ("y", dtype, ("rows", *heads, columns)),
    ]
    return v.script(call.op, buffers, body)


@dataclass(frozen=True)
class Tile:
    """GROUP weight rows, those of number `part` in a task, meet a group of x's rows: their products go to `sums`.

    With a GLU, half of the weight rows are the gate's and half the up projection's, for the same columns. `x_row` is where row t + m of x lies,
    `weight_row` where a row of the weight does: column c's is number `step` · c, that of the up projection `up` more.
    """

    vectors: Vectors
    dtype: str
    k: int
    columns: int
    sums: tuple[str, ...]
    x_row: str = "base + t + m"
    weight_row: str = "{}"
    step: int = 1
    up: int | None = None  # None: `columns`
    bias: str | None = None  # its dtype

    @property
    def width(self) -> int:
        """Columns of the result that are made at once."""
        return GROUP // len(self.sums)

    def __call__(self, group: int, t: str, before: str = "") -> str:
        """`before`: lines that find the rows of x."""
        v, step = self.vectors, self.vectors.step(self.dtype)
        whole, rest = self.k // step, self.k % step
        lines = [f"t: T.let = {t}", *before.splitlines()]
        # One buffer a weight row: TVM keeps only small ones on the stack, from where LLVM takes them into registers.
        lines += [f'acc{r} = T.alloc_buffer(({group},), "{v.type}", scope="global")' for r in range(GROUP)]
        lines += [f"for m in T.unroll({group}):", *(f"    acc{r}[m] = {v.splat(0.0)}" for r in range(GROUP))]
        lines += [f"for k in T.serial({whole}):", indent(self._products(group, f"k * {step}", None), "    ")] if whole else []
        lines += [self._products(group, str(whole * step), str(rest))] if rest else []
        lines += [f"for m in T.unroll({group}):"]
        for r, row in enumerate(self._rows()):
            name, column = self.sums[r // self.width], r % self.width
            bias = f" + {v.load_one(self.bias, f'bias[{row}]')}" if self.bias else ""
            lines.append(f"    {name}[(t + m) * {COLUMNS} + part * {self.width} + {column}] = {v.sum(f'acc{r}[m]')}{bias}")
        return indent("\n".join(lines), "    ")

    def _rows(self) -> list[str]:
        """Places of the GROUP rows of the weight."""
        columns = [f"first + part * {self.width} + {r % self.width}" for r in range(GROUP)]
        if self.columns % COLUMNS:
            columns = [f"T.min({column}, {self.columns - 1})" for column in columns]
        if self.step != 1:
            columns = [f"{self.step} * ({column})" for column in columns]
        up = self.columns if self.up is None else self.up
        return [self.weight_row.format(f"{up} + {column}" if r >= self.width else column) for r, column in enumerate(columns)]

    def _products(self, group: int, k: str, count: str | None) -> str:
        v, rows = self.vectors, self._rows()
        ahead = PREFETCH_BYTES // BYTES[self.dtype]
        fetch = [] if count else [v.prefetch(f"weight[{row}, {k} + {ahead}]") for row in rows]
        products = [f"    acc{r}[m] = {v.dot(self.dtype, f'acc{r}[m]', f'x[{self.x_row}, {k}]', f'weight[{row}, {k}]', count)}" for r, row in enumerate(rows)]
        return "\n".join([*fetch, f"for m in T.unroll({group}):", *products])
