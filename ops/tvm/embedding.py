"""Rows of a table by their numbers: token embeddings, and the rows that need logits."""

from __future__ import annotations

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .vector import DTYPES, INDEX_DTYPES, Vectors, parallel, row_index


@claims("embedding", "tvm")
def embedding(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, target, "weight", "ids")


@claims("gather_rows", "tvm")
def gather_rows(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, target, "x", "rows")


def _candidates(call: Call, steps: Steps, target: Target, table: str, numbers: str) -> list[Candidate]:
    source: Tensor = call.args[table]
    wanted: Tensor = call.args[numbers]
    if source.dtype not in DTYPES or wanted.dtype not in INDEX_DTYPES or len(source.shape) not in (2, 3) or len(wanted.shape) != 1:
        return []
    v, dtype, width = Vectors(target), DTYPES[source.dtype], source.shape[-1]
    assert isinstance(width, int)
    row, rows = row_index(source, "row")
    first, *rest = row.split(", ")

    def copy(k: str, count: str | None) -> list[str]:
        number = f'T.cast({numbers}[{first}], "int64")'  # a table may have more than 2³¹ elements
        return [v.store(dtype, f"y[{row}, {k}]", v.load(dtype, f"{table}[{', '.join([number, *rest, k])}]", count), count)]

    shape = [d if isinstance(d, int) else "table_rows" for d in source.shape]
    buffers = [(numbers, INDEX_DTYPES[wanted.dtype], ["size"]), (table, dtype, shape), ("y", dtype, ["size", *shape[1:]])]
    text = v.script(call.op, buffers, f"for row in {parallel(steps, call.results[0])}({rows}):\n{v.over(width, copy, 1)}")
    operands = (Operand(arg=numbers), Operand(arg=table), Operand(out=0))
    return [Candidate("rows", (Launch(Source(call.op, "tvm", call.op, text), operands),))]
