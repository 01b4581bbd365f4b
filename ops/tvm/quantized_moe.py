"""Mixtures of experts with integer weights: pairs are listed as in `moe.py`, and a task makes a tile of `quantized_linear.py` for all of them.

Rows are rounded to 8 bits before each product; between the two they are float32, so that they are rounded once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from textwrap import indent

import torch

from .. import formats
from ..dims import Dim, product
from ..formats.integer import Integer
from ..glu import ACTIVATIONS
from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .moe import listed, listing, summed
from .quantized_linear import Product
from .vector import DTYPES, INDEX_DTYPES, Buffer, Vectors, numbers


@claims("quantized_moe", "tvm")
def quantized_moe(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args, form, v = call.args, formats.get(call.args["format"]), Vectors(target)
    x, ids, inner = args["x"], args["expert_ids"], args["inner"]
    if not isinstance(form, Integer) or args["layout"] != "tile16" or not args["activation"].startswith("int8_"):
        return []
    floats = [x, *(args[n] for n in ("expert_weights", "s_in", "z_in", "b_in", "s_out", "z_out", "b_out") if args[n] is not None)]
    if len(x.shape) != 2 or any(t.dtype not in DTYPES for t in floats) or ids.dtype not in INDEX_DTYPES:
        return []
    if any(math.prod(numbers(args[n].shape)) >= 1 << 31 for n in ("w_in", "w_out")):  # indices are int32
        return []
    (tokens, width), (_, active) = x.shape, ids.shape
    pairs = product(tokens, active)
    first = Product.of(v, form, args, "_in", DTYPES[x.dtype], width)
    second = Product.of(v, form, args, "_out", "float32", inner)
    floating = lambda columns: Tensor(torch.float32, (pairs, columns))
    scratch = (*listed(call, pairs), *first.rounded(tokens), floating(inner), *second.rounded(pairs), floating(width))
    at = [Operand(scratch=i) for i in range(len(scratch))]
    launches = (
        listing(call, v),
        first.rounding(Operand(arg="x"), tuple(at[2:5]), tokens, steps),
        _multiply(call, first, "in", inner, active, (*at[2:5], *at[:2], at[5]), pairs, steps, args["act"]),
        second.rounding(at[5], tuple(at[6:9]), pairs, steps),
        _multiply(call, second, "out", width, 1, (*at[6:9], *at[:2], at[9]), pairs, steps, None),
        summed(call, v, steps, 9),
    )
    return [Candidate("tiles", launches, scratch)]


def _multiply(call: Call, of: Product, side: str, columns: int, shared: int, given: tuple[Operand, ...], pairs: Dim, steps: Steps, act: str | None) -> Launch:
    """y [pairs, columns] = act(x[pair // shared] · weight[expert] + bias[expert]). `given`: rounded rows, the list of pairs, y."""
    v, bias, two = of.vectors, call.args[f"b_{side}"], act is not None and call.args["gated"]
    experts, tiles, *_ = numbers(of.parts["weight"].shape)
    streams = ["expert, task", f"expert, {tiles // 2} + task"] if two else ["expert, task"]

    def finish(totals: list[str], column: str, count: str | None) -> list[str]:
        if bias is not None:
            starts = [column, f"{columns} + {column}"]
            totals = [f"{t} + {v.load(DTYPES[bias.dtype], f'bias[expert, {at}]', count)}" for t, at in zip(totals, starts, strict=False)]
        if act is None:
            (y,) = totals
        elif two and act in ACTIVATIONS:
            y = f"{v.call(act, totals[0])} * ({totals[1]})"
        else:  # of one, or a gate's own formula of both
            y = v.call(act, *totals)
        return [v.store("float32", f"y[order[t + m], {column}]", y, count)]

    found = 'found = T.alloc_buffer(({0},), "int32", scope="global")\nfor m in T.unroll({0}):\n    found[m] = order[t + m] // ' + str(shared)
    rows = replace(of, x_row="found[m]", find_rows=found).all_rows("starts[expert]", "height", steps.bound(pairs), streams, columns, finish)
    body = f"""
for task in T.parallel({tiles // len(streams)}):
    for expert in T.serial({experts}):
        height: T.let = starts[expert + 1] - starts[expert]
{indent(rows, " " * 8)}
"""
    buffers: list[Buffer] = [*of.buffers("size"), *([] if bias is None else [("bias", DTYPES[bias.dtype], numbers(bias.shape))])]
    buffers += [("order", "int32", ("pairs",)), ("starts", "int32", (experts + 3,)), ("y", "float32", ("pairs", columns))]
    parts = tuple(Operand(arg=f"{p}_{side}") for p in "wszb" if call.args[f"{p}_{side}"] is not None)
    name = f"w_{side}_tiles"
    *rounded, order, starts, y = given
    return Launch(Source("quantized_moe", "tvm", name, v.script(name, buffers, body)), (*rounded, *parts, order, starts, y))
