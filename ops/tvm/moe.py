"""Mixtures of experts: pairs of a token and an expert are listed by expert; a task then makes eight columns of the result for all of them.

Each task goes through the experts that have pairs, so that threads have equal work however few experts that are, and a weight is
read once however many pairs its expert has. The product is that of `linear.py`, whose rows of x are found through the list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from textwrap import indent

import torch

from ..dims import Dim, product
from ..glu import ACTIVATIONS
from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .linear import COLUMNS, GROUP, MAX_ROWS, Tile
from .vector import DTYPES, INDEX_DTYPES, Buffer, Vectors, numbers, parallel


@claims("grouped_linear", "tvm")
def grouped_linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    if not _supported(call, "weight", "bias"):
        return []
    v = Vectors(target)
    one = _Product(v, call, "weight", "bias", zeros=True)
    return [Candidate("experts", (listing(call, v), one.launch(Operand(arg="x"), Operand(out=0))), listed(call, call.args["x"].shape[0]))]


@claims("moe", "tvm")
def moe(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args, v = call.args, Vectors(target)
    if not _supported(call, "w_in", "b_in", "w_out", "b_out"):
        return []
    tokens, active = args["expert_ids"].shape
    pairs = product(tokens, active)
    first = _Product(v, call, "w_in", "b_in", active, args["act"], args["gated"], args["interleaved"])
    second = _Product(v, call, "w_out", "b_out", result="float32")
    scratch = (*listed(call, pairs), Tensor(args["x"].dtype, (pairs, first.columns)), Tensor(torch.float32, (pairs, second.columns)))
    launches = (
        listing(call, v),
        first.launch(Operand(arg="x"), Operand(scratch=2)),
        second.launch(Operand(scratch=2), Operand(scratch=3)),
        summed(call, v, steps, 3),
    )
    return [Candidate("experts", launches, scratch)]


def _supported(call: Call, *weights: str) -> bool:
    """Rows of a weight must lie together: `straighten_experts` has seen to that."""
    tensors = [call.args[n] for n in weights if call.args[n] is not None]
    dtype, ids = call.args["x"].dtype, call.args["expert_ids"]
    if call.args["transposed"] or len(call.args["x"].shape) != 2 or dtype not in DTYPES or ids.dtype not in INDEX_DTYPES:
        return False
    if any(math.prod(numbers(t.shape)) >= 1 << 31 for t in tensors):  # indices are int32
        return False
    given = call.args.get("expert_weights")
    return all(t.dtype == dtype if len(t.shape) == 3 else t.dtype in DTYPES for t in tensors) and (given is None or given.dtype in DTYPES)


@dataclass(frozen=True)
class _Ids:
    """The argument `expert_ids` [rows, A] or [rows], of pairs numbered row by row."""

    buffer: Buffer
    active: int
    experts: int

    @classmethod
    def of(cls, call: Call) -> _Ids:
        ids: Tensor = call.args["expert_ids"]
        many = numbers(ids.shape[1:])
        (experts,) = numbers(call.args["w_in" if "w_in" in call.args else "weight"].shape[:1])
        return cls(("ids", INDEX_DTYPES[ids.dtype], ("rows", *many)), many[0] if many else 1, experts)

    def bucket(self, row: str, number: str) -> str:
        """A pair's expert, or `experts` for an id outside the table, which means "no expert"."""
        index = f"{row}, {number}" if len(self.buffer[2]) > 1 else row
        return f'T.Cast("int32", T.min(T.Cast("uint64", ids[{index}]), T.uint64({self.experts})))'


def listing(call: Call, v: Vectors) -> Launch:
    """order: pairs by expert, those without one last; those of expert e are numbers starts[e] up to starts[e + 1]. A counting sort."""
    ids = _Ids.of(call)
    pair = f"for row in T.serial(rows):\n    for a in T.serial({ids.active}):\n        e: T.let = {ids.bucket('row', 'a')}"
    body = f"""
for e in T.serial({ids.experts + 3}):
    starts[e] = 0
{pair}
        starts[e + 2] = starts[e + 2] + 1
for e in T.serial({ids.experts}):
    starts[e + 2] = starts[e + 2] + starts[e + 1]
{pair}
        order[starts[e + 1]] = row * {ids.active} + a
        starts[e + 1] = starts[e + 1] + 1
"""
    text = v.script("list_pairs", [ids.buffer, ("order", "int32", ("pairs",)), ("starts", "int32", (ids.experts + 3,))], body)
    return Launch(Source("moe", "tvm", "list_pairs", text), (Operand(arg="expert_ids"), Operand(scratch=0), Operand(scratch=1)))


def listed(call: Call, pairs: Dim) -> tuple[Tensor, Tensor]:
    """What `listing` makes, as scratch."""
    return Tensor(torch.int32, (pairs,)), Tensor(torch.int32, (_Ids.of(call).experts + 3,))


@dataclass(frozen=True)
class _Product:
    """y [pairs, …] = act(x[pair // shared] · weight[expert] + bias[expert]); `zeros`: of a pair without an expert too."""

    vectors: Vectors
    call: Call
    weight: str
    bias: str
    shared: int = 1
    act: str | None = None
    gated: bool = False
    interleaved: bool = False
    result: str = ""  # its dtype, where it is not x's
    zeros: bool = False

    @property
    def columns(self) -> int:
        _, width, _ = numbers(self.call.args[self.weight].shape)
        return width // 2 if self.gated else width

    def launch(self, x: Operand, out: Operand) -> Launch:
        given = [Operand(arg=n) for n in (self.weight, self.bias) if self.call.args[n] is not None]
        name = f"{self.weight}_experts"
        return Launch(Source("moe", "tvm", name, self._text(name)), (x, *given, Operand(scratch=0), Operand(scratch=1), out))

    def _text(self, name: str) -> str:
        v, columns = self.vectors, self.columns
        experts, width, k = numbers(self.call.args[self.weight].shape)
        dtype, bias = DTYPES[self.call.args["x"].dtype], self.call.args[self.bias]
        result = self.result or dtype
        up = (1 if self.interleaved else columns) if self.gated else None
        tile = Tile(v, dtype, k, columns, ("gate", "up") if self.gated else ("sums",), x_row="found[m]", weight_row="expert, {}",
                    step=2 if self.gated and self.interleaved else 1, up=up, bias=None if bias is None else DTYPES[bias.dtype])  # fmt: skip
        sums = [v.load("float32", f"{s}[t * {COLUMNS}]", str(COLUMNS)) for s in tile.sums]
        if self.act is None:
            (y,) = sums
        elif self.gated and self.act in ACTIVATIONS:
            y = f"{v.call(self.act, sums[0])} * {sums[1]}"
        else:  # of one, or a gate's own formula of both
            y = v.call(self.act, *sums)
        count = f"T.min({columns} - first, {COLUMNS})" if columns % COLUMNS else str(COLUMNS)

        def found(group: int) -> str:
            each = f"    found[m] = order[begin + t + m] // {self.shared}"
            return f'found = T.alloc_buffer(({group},), "int32", scope="global")\nfor m in T.unroll({group}):\n{each}'

        allocated = "\n".join(f'{s} = T.alloc_buffer(({MAX_ROWS * COLUMNS},), "float32", scope="global")' for s in tile.sums)
        body = f"""
for task in T.parallel({-(-columns // COLUMNS)}):
    first: T.let = task * {COLUMNS}
    for expert in T.serial({experts}):
        for block in T.serial((starts[expert + 1] - starts[expert] + {MAX_ROWS - 1}) // {MAX_ROWS}):
            begin: T.let = starts[expert] + block * {MAX_ROWS}
            height: T.let = T.min(starts[expert + 1] - begin, {MAX_ROWS})
{indent(allocated, " " * 12)}
            for part in T.serial({COLUMNS // tile.width}):
                for group in T.serial(height // {GROUP}):
{indent(tile(GROUP, f"group * {GROUP}", found(GROUP)), " " * 16)}
                for single in T.serial(height % {GROUP}):
{indent(tile(1, f"height // {GROUP} * {GROUP} + single", found(1)), " " * 16)}
            for t in T.serial(height):
                {v.store(result, "y[order[begin + t], first]", y, count)}
"""
        if self.zeros:
            body += f"""
    for p in T.serial(pairs - starts[{experts}]):
        {v.store(result, f"y[order[starts[{experts}] + p], first]", v.splat(0.0), count)}
"""
        buffers: list[Buffer] = [("x", dtype, ("size", k)), ("weight", dtype, (experts, width, k))]
        buffers += [] if bias is None else [("bias", DTYPES[bias.dtype], (experts, width))]
        buffers += [("order", "int32", ("pairs",)), ("starts", "int32", (experts + 3,)), ("y", result, ("pairs", columns))]
        return v.script(name, buffers, body)


def summed(call: Call, v: Vectors, steps: Steps, scratch: int) -> Launch:
    """Of each token the rows of its pairs times their weights, those without an expert left out."""
    ids, weights, out = _Ids.of(call), call.args["expert_weights"], call.results[0]
    (columns,) = numbers(out.shape[1:])
    dtype, active = DTYPES[out.dtype], ids.active

    def column(k: str, count: str | None) -> list[str]:
        pair = v.load("float32", f"pairs[t * {active} + a, {k}]", count)
        return [
            f"total[0] = {v.splat(0.0)}",
            f"for a in T.serial({active}):",
            f"    if {ids.bucket('t', 'a')} < {ids.experts}:",
            f"        total[0] = total[0] + {pair} * {v.splat(v.load_one(DTYPES[weights.dtype], 'weights[t, a]'))}",
            v.store(dtype, f"y[t, {k}]", "total[0]", count),
        ]

    body = f"""
for t in {parallel(steps, out, cost=active)}(rows):
    total = T.alloc_buffer((1,), "{v.type}", scope="global")
{v.over(columns, column, 1)}
"""
    buffers: list[Buffer] = [("pairs", "float32", ("size", columns)), ids.buffer, ("weights", DTYPES[weights.dtype], ("rows", active)),
                             ("y", dtype, ("rows", columns))]  # fmt: skip
    operands = (Operand(scratch=scratch), Operand(arg="expert_ids"), Operand(arg="expert_weights"), Operand(out=0))
    return Launch(Source("moe", "tvm", "sum_experts", v.script("sum_experts", buffers, body)), operands)
