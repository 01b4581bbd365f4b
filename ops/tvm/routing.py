"""The choice of experts: of a row the largest elements, one after the other, with their weights."""

from __future__ import annotations

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .vector import DTYPES, Buffer, Vectors, numbers, parallel, row_index


@claims("route", "tvm")
def route(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    logits: Tensor = call.args["logits"]
    if logits.dtype not in DTYPES or call.args["dtype"] not in DTYPES or len(logits.shape) not in (2, 3):
        return []
    text = _script(Vectors(target), call, steps)
    return [Candidate("rows", (Launch(Source("route", "tvm", "route", text), (Operand(arg="logits"), Operand(out=0), Operand(out=1))),))]


def _script(v: Vectors, call: Call, steps: Steps) -> str:
    logits, k, args = call.args["logits"], call.args["k"], call.args
    dtype, result = DTYPES[logits.dtype], DTYPES[args["dtype"]]
    *heads, width = numbers(logits.shape[1:])
    row, rows = row_index(logits, "row")

    def copied(n: str, count: str | None) -> list[str]:
        return [v.store("float32", f"x[{n}]", v.load(dtype, f"logits[{row}, {n}]", count), count)]

    def shares(n: str, count: str | None) -> list[str]:
        distance = f"{v.load('float32', f'x[{n}]', count)} - {v.splat('y[0]')}"
        distance = distance if count is None else v.call("between", distance, "0", count)  # what is behind the end has no share
        return [f"total[0] = total[0] + {v.call('exp', distance)}"]

    # what comes behind the element taken last, in the order of elements and, of equal ones, places
    body = f"""
for row in {parallel(steps, logits, cost=k)}({rows}):
    x = T.alloc_buffer(({width},), "float32", scope="global")
    y = T.alloc_buffer(({k},), "float32", scope="global")
    best = T.alloc_buffer((1,), "float32", scope="global")
    last = T.alloc_buffer((1,), "float32", scope="global")
    place = T.alloc_buffer((1,), "int32", scope="global")
    last_place = T.alloc_buffer((1,), "int32", scope="global")
    total = T.alloc_buffer((1,), "{v.type}", scope="global")
{v.over(width, copied, 1)}
    last[0] = T.float32("inf")
    last_place[0] = -1
    for i in T.serial({k}):
        place[0] = -1
        for n in T.serial({width}):
            if x[n] < last[0] or (x[n] == last[0] and n > last_place[0]):
                if place[0] < 0 or x[n] > best[0]:
                    best[0] = x[n]
                    place[0] = n
        last[0] = best[0]
        last_place[0] = place[0]
        y[i] = best[0]
        ids[{row}, i] = T.Cast("int64", place[0])
"""
    scale = f"T.float32({args['scale']!r})"
    if args["softmax"]:
        body += f"""
    total[0] = {v.splat(0.0)}
{v.over(width, shares, 1)}
    best[0] = {v.sum("total[0]")}
    last[0] = y[0]
    for i in T.serial({k}):
        y[i] = {v.first(v.call("exp", v.splat("y[i] - last[0]")))} / best[0]
"""
    if args["renormalize"]:
        body += f"""
    best[0] = T.float32(0)
    for i in T.serial({k}):
        best[0] = best[0] + y[i]
    for i in T.serial({k}):
        y[i] = y[i] / best[0]
"""
    body += f"""
    for i in T.serial({k}):
        {v.store_one(result, f"weights[{row}, i]", f"y[i] * {scale}")}
"""
    shape: tuple[int | str, ...] = ("size", *heads)
    buffers: list[Buffer] = [("logits", dtype, (*shape, width)), ("weights", result, (*shape, k)), ("ids", "int64", (*shape, k))]
    return v.script("route", buffers, body)
