"""One vector from the tokens of each sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from ..kernel import Call, Candidate, Operand, Steps, claims
from ..target import Target
from .source import launch, power_of_two, supported


@triton.jit
def pool_kernel(x, cu_seqlens_q, pooling, out, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    seq = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(cu_seqlens_q + seq)
    end = tl.load(cu_seqlens_q + seq + 1)
    how = tl.load(pooling + seq)
    # a range of tokens: all, the first, or the last
    start = tl.where(how == 2, tl.maximum(begin, end - 1), begin)
    stop = tl.where(how == 1, tl.minimum(begin + 1, end), end)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < stop)[:, None] & (col < WIDTH)[None, :]
        total += tl.sum(tl.load(x + row.to(tl.int64)[:, None] * WIDTH + col[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(out + seq.to(tl.int64) * WIDTH + col, total / tl.maximum(stop - start, 1), mask=col < WIDTH)


@claims("pool", "triton")
def pool(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    width = call.args["x"].shape[1]
    if not supported(call) or not isinstance(width, int):
        return []
    operands = {"x": Operand(arg="x"), "cu_seqlens_q": Operand(arg="cu_seqlens_q"), "pooling": Operand(arg="pooling"), "out": Operand(out=0)}
    block = min(128, power_of_two(width))
    one = launch(call, [pool_kernel], operands, {"WIDTH": width, "ROWS": 16, "BLOCK": block}, ((call.results[0].shape[0], 1), (width, block)))
    return [Candidate(f"b{block}", (one,))]
