"""One vector from the tokens of each sequence."""

from __future__ import annotations

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, claims
from ..target import Target
from .vector import DTYPES, Buffer, Vectors, numbers


@claims("pool", "tvm")
def pool(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """A sequence's mean is a loop over a range of its tokens; `cls` and `last` are ranges of one."""
    x = call.args["x"]
    if x.dtype not in DTYPES:
        return []
    v, dtype, (width,) = Vectors(target), DTYPES[x.dtype], numbers(x.shape[1:])

    def mean(k: str, count: str | None) -> list[str]:
        return [
            f"total[0] = {v.splat(0.0)}",
            "for t in T.serial(stop - start):",
            f"    total[0] = total[0] + {v.load(dtype, f'x[start + t, {k}]', count)}",
            v.store("float32", f"y[s, {k}]", f"total[0] * {v.splat('share')}", count),
        ]

    loop = "T.parallel" if steps.bound(x.shape[0]) * width >= 1 << 15 else "T.serial"
    body = f"""
for s in {loop}(seqs):
    total = T.alloc_buffer((1,), "{v.type}", scope="global")
    begin: T.let = cu_seqlens_q[s]
    end: T.let = cu_seqlens_q[s + 1]
    start: T.let = T.if_then_else(pooling[s] == 2, T.max(begin, end - 1), begin)
    stop: T.let = T.if_then_else(pooling[s] == 1, T.min(begin + 1, end), end)
    share: T.let = T.float32(1) / T.cast(T.max(stop - start, 1), "float32")
{v.over(width, mean, 1)}
"""
    buffers: list[Buffer] = [
        ("x", dtype, ("tokens", width)), ("cu_seqlens_q", "int32", ("starts",)), ("pooling", "int32", ("seqs",)), ("y", "float32", ("seqs", width)),
    ]  # fmt: skip
    operands = (Operand(arg="x"), Operand(arg="cu_seqlens_q"), Operand(arg="pooling"), Operand(out=0))
    return [Candidate("ranges", (Launch(Source("pool", "tvm", "pool", v.script("pool", buffers, body)), operands),))]
