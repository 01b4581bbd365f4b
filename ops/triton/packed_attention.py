"""Attention in both directions over packed sequences: online softmax over blocks of a sequence's keys (Dao et al. 2022).

Tiles of tokens × the query heads of one kv head are numbered over the ragged batch, as in `attention.py`; each program finds
its sequence in `cu_seqlens_q`. The tokens after the last sequence are one more, without keys, whose output is zero.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..dims import plus
from ..kernel import Call, Candidate, Operand, Steps, claims
from ..target import Target
from .attention import tiles
from .ragged import tile_of, tiles_of
from .source import FLOATS, launch, power_of_two, supported


@triton.jit
def packed_attention_kernel(q, k, v, cu_seqlens_q, out, num_tokens, num_seqs, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
                            SCALE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
                            BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    GROUP: tl.constexpr = H // K
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    seq, start, begin = tile_of(tl.program_id(0), cu_seqlens_q, num_seqs, 1, BLOCK_Q, BLOCK_S)
    queries = tl.load(cu_seqlens_q + seq + 1, mask=seq < num_seqs, other=num_tokens) - start
    keys = tl.where(seq < num_seqs, queries, 0)
    m = tl.arange(0, BLOCK_M)
    query = begin + m // GROUP
    head = kv_head * GROUP + m % GROUP
    row = (start + query).to(tl.int64) * H + head
    valid = (m < BLOCK_Q * GROUP) & (query < queries)
    e = tl.arange(0, BLOCK_E)
    f = tl.arange(0, BLOCK_F)
    h = tl.load(q + row[:, None] * E + e[None, :], mask=valid[:, None] & (e < E)[None, :], other=0.0)
    low = 0
    high = tl.where(begin < queries, keys, 0)
    if WINDOW > 0:
        low = tl.maximum(low, begin - WINDOW + 1) // BLOCK_N
        high = tl.minimum(high, begin + BLOCK_Q - 1 + WINDOW)
    high = (high + BLOCK_N - 1) // BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for block in range(low, high):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        there = n < keys
        source = (start + n).to(tl.int64) * K + kv_head
        key = tl.load(k + source[None, :] * E + e[:, None], mask=there[None, :] & (e < E)[:, None], other=0.0)
        scores = tl.dot(h, key, input_precision=PRECISION) * (SCALE * 1.4426950408889634)
        seen = there[None, :]
        if WINDOW > 0:
            seen = seen & (n[None, :] > query[:, None] - WINDOW) & (n[None, :] < query[:, None] + WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # a row whose window begins in a later block keeps −inf: measured from 0 its weights are 0 and not NaN
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - origin[:, None])
        decay = tl.exp2(top - origin)
        total = total * decay + tl.sum(p, 1)
        value = tl.load(v + source[:, None] * F + f[None, :], mask=there[:, None] & (f < F)[None, :], other=0.0)
        acc = tl.dot(p.to(h.dtype), value, acc * decay[:, None], input_precision=PRECISION)
        top = higher
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + row[:, None] * F + f[None, :], acc.to(out.dtype.element_ty), mask=valid[:, None] & (f < F)[None, :])


@claims("packed_attention", "triton")
def packed_attention(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    q, k, v = (args[n] for n in ("q", "k", "v"))
    if not supported(call) or q.dtype not in FLOATS or {k.dtype, v.dtype} != {q.dtype}:
        return []
    tokens, heads, e = q.shape
    kv_heads, f = v.shape[1:]
    group = heads // kv_heads
    seqs = plus(args["cu_seqlens_q"].shape[0], -1)
    block_e, block_f = max(16, power_of_two(e)), max(16, power_of_two(f))
    constants: dict[str, Any] = {
        "H": heads, "K": kv_heads, "E": e, "F": f, "SCALE": args["scale"], "WINDOW": args["window"], "BLOCK_E": block_e, "BLOCK_F": block_f,
        "BLOCK_S": power_of_two(steps.max_seqs + 1), "PRECISION": "ieee" if q.dtype.itemsize == 4 else None,
    }  # fmt: skip
    operands = {n: Operand(arg=n) for n in ("q", "k", "v", "cu_seqlens_q")}
    operands |= {"out": Operand(out=0), "num_tokens": Operand(size=tokens), "num_seqs": Operand(size=seqs)}
    found = []
    for rank, t in enumerate(tiles(None, target, group, block_e, block_f, q.dtype.itemsize)):
        block_q = t.m // group
        grid = (tiles_of(tokens, seqs, block_q), (kv_heads, 1))
        blocks = constants | {"BLOCK_M": t.m, "BLOCK_N": t.n}
        one = launch(call, [packed_attention_kernel, tile_of], operands, blocks, grid, num_warps=t.warps, num_stages=t.stages)
        found.append(Candidate(str(t), (one,), rank=rank))
    return found
