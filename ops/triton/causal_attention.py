"""Paged attention of many new tokens, as lean as it gets: causal, over all earlier tokens, nothing between score and softmax.

One online softmax over blocks of keys (Dao et al. 2022), query heads of one kv head packed into a tile's rows. A block of keys is
at most two pages, so that its addresses are two numbers and constants; blocks that every query sees are folded without a mask.
Tiles that come last in the batch have the most keys before them and start first, those of all heads together, or the last head's would be waited for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..kernel import Call, Candidate, Operand, Steps, claims
from ..target import SHARED_MEMORY_BYTES, Target
from .attention import Tile
from .ragged import tile_of, tile_of_rank, tiles_of
from .source import launch, power_of_two, supported


@triton.jit
def fold(h, acc, top, total, position, begin, stop, length, pages, k_cache, v_cache, kv_head, K: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
         PAGE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Fold keys of blocks `begin` … `stop` − 1 into (acc, top, total); UNIT turns a score into units of log 2. MASKED: some query does not see some key."""
    i = tl.arange(0, BLOCK_N)
    e = tl.arange(0, E)
    f = tl.arange(0, F)
    for block in range(begin, stop):
        start = block * BLOCK_N
        first = (tl.load(pages + start // PAGE).to(tl.int64) * K + kv_head) * PAGE + start % PAGE
        k_at = k_cache + first * E + (i[None, :] * E + e[:, None])
        v_at = v_cache + first * F + (i[:, None] * F + f[None, :])
        if BLOCK_N > PAGE:
            tl.static_assert(BLOCK_N == 2 * PAGE, "a block is at most two pages")
            second = (tl.load(pages + start // PAGE + 1, mask=start + PAGE < length, other=0).to(tl.int64) * K + kv_head) * PAGE - PAGE
            k_at = tl.where(i[None, :] < PAGE, k_at, k_cache + second * E + (i[None, :] * E + e[:, None]))
            v_at = tl.where(i[:, None] < PAGE, v_at, v_cache + second * F + (i[:, None] * F + f[None, :]))
        if MASKED:
            k = tl.load(k_at, mask=start + i[None, :] < length, other=0.0)
        else:
            k = tl.load(k_at)
        scores = tl.dot(h, k)
        if MASKED:
            scores = tl.where(start + i[None, :] <= position[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores * UNIT - (higher * UNIT)[:, None])
        decay = tl.exp2((top - higher) * UNIT)
        total = total * decay + tl.sum(p, 1)
        if MASKED:
            v = tl.load(v_at, mask=start + i[:, None] < length, other=0.0)
        else:
            v = tl.load(v_at)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None])
        top = higher
    return acc, top, total


@triton.jit
def causal_attention_kernel(q, k_cache, v_cache, cu_seqlens_q, seq_lens, page_table, sinks, out, num_tokens, num_seqs, num_columns, H: tl.constexpr,
                            K: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr,
                            BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = H // K
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    LOG2E: tl.constexpr = 1.4426950408889634
    place = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    kv_head = place % K
    tile = tile_of_rank(place // K, cu_seqlens_q, seq_lens, num_seqs, BLOCK_Q, BLOCK_S)
    seq, start, begin = tile_of(tile, cu_seqlens_q, num_seqs, 1, BLOCK_Q, BLOCK_S)
    queries = tl.load(cu_seqlens_q + seq + 1, mask=seq < num_seqs, other=num_tokens) - start
    if PDL:
        tl.extra.cuda.gdc_wait()
    if begin < queries:
        length = tl.load(seq_lens + seq, mask=seq < num_seqs, other=0)
        m = tl.arange(0, BLOCK_M)
        query = begin + m // GROUP
        head = kv_head * GROUP + m % GROUP
        row = (start + query).to(tl.int64) * H + head
        valid = (m < BLOCK_Q * GROUP) & (query < queries)
        # a row without a query takes part as one that sees all keys
        position = tl.where(valid, length - queries + query, length)
        h = tl.load(q + row[:, None] * E + tl.arange(0, E)[None, :], mask=valid[:, None], other=0.0)
        earliest = length - queries + begin
        middle = tl.maximum(earliest + 1, 0) // BLOCK_N
        high = (tl.minimum(length, earliest + BLOCK_Q) + BLOCK_N - 1) // BLOCK_N
        acc = tl.zeros([BLOCK_M, F], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        pages = page_table + seq.to(tl.int64) * num_columns
        acc, top, total = fold(h, acc, top, total, position, 0, middle, length, pages, k_cache, v_cache, kv_head, K, E, F, PAGE, SCALE * LOG2E, BLOCK_N, False)
        acc, top, total = fold(h, acc, top, total, position, middle, high, length, pages, k_cache, v_cache, kv_head, K, E, F, PAGE, SCALE * LOG2E, BLOCK_N,
                               True)  # fmt: skip
        if sinks is not None:
            sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
            higher = tl.maximum(top * (SCALE * LOG2E), sink)
            decay = tl.exp2(top * (SCALE * LOG2E) - higher)
            total = total * decay + tl.exp2(sink - higher)
            acc *= decay[:, None]
        acc /= tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + row[:, None] * F + tl.arange(0, F)[None, :], acc.to(out.dtype.element_ty), mask=valid[:, None])


def _shared_bytes(tile: Tile, e: int, f: int) -> int:
    return 2 * (tile.m * max(e, f) + tile.stages * tile.n * (e + f))


# best first for long prompts: benchmarks/gpu_kernels.py
TILES = (Tile(128, 128, 8, 3), Tile(128, 64, 4, 2), Tile(64, 64, 4, 3))


def is_plain(call: Call, steps: Steps) -> bool:
    """Whether there is nothing between score and softmax, no quantized cache, heads of a power of two, and more rows than a decode step's."""
    args = call.args
    q, k_cache, v_cache = args["q"], args["k_cache"], args["v_cache"]
    e, f = k_cache.shape[3], v_cache.shape[3]
    plain = args["alibi_slopes"] is None and not (args["window"] or args["chunk"] or args["softcap"])
    halves = q.dtype != torch.float32 and q.dtype == k_cache.dtype == v_cache.dtype
    many = steps.max_num_new * q.shape[1] // k_cache.shape[1] > 64
    return supported(call) and plain and halves and many and power_of_two(e) == e and power_of_two(f) == f and min(e, f) >= 16


def operands_of(call: Call) -> dict[str, Operand]:
    """What every kernel of such attention is given, in its order."""
    tokens, (seqs, columns) = call.args["q"].shape[0], call.args["page_table"].shape
    operands = {n: Operand(arg=n) for n in ("q", "k_cache", "v_cache", "cu_seqlens_q", "seq_lens", "page_table", "sinks")}
    return operands | {"out": Operand(out=0), "num_tokens": Operand(size=tokens), "num_seqs": Operand(size=seqs), "num_columns": Operand(size=columns)}


@claims("paged_attention", "triton")
def causal_attention(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    q, k_cache, v_cache = args["q"], args["k_cache"], args["v_cache"]
    tokens, heads, e = q.shape
    kv_heads, page_size, f = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    group = heads // kv_heads
    if not is_plain(call, steps):
        return []
    seqs = args["page_table"].shape[0]
    operands = operands_of(call)
    found: list[Candidate] = []
    for t in TILES:
        if t.n > 2 * page_size or page_size % min(t.n, page_size) or group > t.m or _shared_bytes(t, e, f) > SHARED_MEMORY_BYTES[target.isa]:
            continue
        block_q = t.m // group
        constants = {"H": heads, "K": kv_heads, "E": e, "F": f, "PAGE": page_size, "SCALE": args["scale"], "BLOCK_M": t.m, "BLOCK_N": t.n,
                     "BLOCK_S": power_of_two(steps.max_seqs + 1)}  # fmt: skip
        one = launch(call, [causal_attention_kernel, tile_of_rank, tile_of, fold], operands, constants, (tiles_of(tokens, seqs, block_q), (kv_heads, 1)),
                     num_warps=t.warps, num_stages=t.stages)  # fmt: skip
        found.append(Candidate(f"causal_{t}", (one,), rank=-1 + len(found) / 10))
    return found
