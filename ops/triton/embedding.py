"""Rows by index: token embeddings, and the rows that need logits."""

from __future__ import annotations

import triton
import triton.language as tl

from ..dims import Dim, product
from ..kernel import Call, Candidate, Operand, Steps, claims
from ..target import Target
from .source import launch, power_of_two, supported


@triton.jit
def gather_kernel(indices, source, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + row).to(tl.int64)
    values = tl.load(source + index * WIDTH + col, mask=col < WIDTH)
    tl.store(out + row.to(tl.int64) * WIDTH + col, values, mask=col < WIDTH)


def _candidates(call: Call, indices: str, source: str) -> list[Candidate]:
    width: Dim = 1
    for size in call.args[source].shape[1:]:
        width = product(width, size)
    if not supported(call) or not isinstance(width, int):
        return []
    count: Dim = 1
    for size in call.args[indices].shape:
        count = product(count, size)
    operands = {"indices": Operand(arg=indices), "source": Operand(arg=source), "out": Operand(out=0)}
    block = min(2048, power_of_two(width))
    one = launch(call, [gather_kernel], operands, {"WIDTH": width, "BLOCK": block}, ((count, 1), (width, block)))
    return [Candidate(f"b{block}", (one,))]


@claims("embedding", "triton")
def embedding(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, "ids", "weight")


@claims("gather_rows", "triton")
def gather_rows(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, "rows", "x")
