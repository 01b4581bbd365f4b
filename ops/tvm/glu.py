"""Gated linear units over a merged gate/up projection."""

from __future__ import annotations

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .vector import DTYPES, Buffer, Vectors, numbers, parallel, row_index


@claims("glu", "tvm")
def glu(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    gate_up: Tensor = call.args["gate_up"]
    if gate_up.dtype not in DTYPES or len(gate_up.shape) not in (2, 3):
        return []
    v, dtype = Vectors(target), DTYPES[gate_up.dtype]
    *heads, merged = numbers(gate_up.shape[1:])
    width = merged // 2
    row, rows = row_index(gate_up, "row")

    def gated(k: str, count: str | None) -> list[str]:
        gate, up = v.load(dtype, f"gate_up[{row}, {k}]", count), v.load(dtype, f"gate_up[{row}, {width} + {k}]", count)
        return [v.store(dtype, f"y[{row}, {k}]", f"{v.call(call.args['act'], gate)} * {up}", count)]

    buffers: list[Buffer] = [("gate_up", dtype, ("size", *heads, merged)), ("y", dtype, ("size", *heads, width))]
    text = v.script("glu", buffers, f"for row in {parallel(steps, gate_up)}({rows}):\n{v.over(width, gated, 1)}")
    return [Candidate("rows", (Launch(Source("glu", "tvm", "glu", text), (Operand(arg="gate_up"), Operand(out=0))),))]
