"""Rows of a table by their numbers: token embeddings, and the rows that need logits."""

from __future__ import annotations

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .vector import DTYPES, INDEX_DTYPES, Buffer, Vectors, numbers, parallel, row_index


@claims("embedding", "tvm")
def embedding(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, target, "weight", "ids")


@claims("gather_rows", "tvm")
def gather_rows(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, target, "x", "rows")


def _candidates(call: Call, steps: Steps, target: Target, table: str, index: str) -> list[Candidate]:
    source: Tensor = call.args[table]
    wanted: Tensor = call.args[index]
    if source.dtype not in DTYPES or wanted.dtype not in INDEX_DTYPES or len(source.shape) not in (2, 3) or len(wanted.shape) != 1:
        return []
    v, dtype, widths = Vectors(target), DTYPES[source.dtype], numbers(source.shape[1:])
    row, rows = row_index(source, "row")
    first, *rest = row.split(", ")

    def copy(k: str, count: str | None) -> list[str]:
        # a table may have more than 2³¹ elements
        number = f'T.cast({index}[{first}], "int64")'
        return [v.store(dtype, f"y[{row}, {k}]", v.load(dtype, f"{table}[{', '.join([number, *rest, k])}]", count), count)]

    buffers: list[Buffer] = [(index, INDEX_DTYPES[wanted.dtype], ("size",)), (table, dtype, ("table_rows", *widths)), ("y", dtype, ("size", *widths))]
    text = v.script(call.op, buffers, f"for row in {parallel(steps, call.results[0])}({rows}):\n{v.over(widths[-1], copy, 1)}")
    operands = (Operand(arg=index), Operand(arg=table), Operand(out=0))
    return [Candidate("rows", (Launch(Source(call.op, "tvm", call.op, text), operands),))]
