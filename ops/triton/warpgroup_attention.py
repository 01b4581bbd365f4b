"""Paged attention of many new tokens on Hopper: softmax and matrix products at the same time, by warps with different tasks.

What `causal_attention.py` computes, in Gluon, where a program says which warps do what. One warpgroup copies keys and values to shared memory, two
others attend with half of the tile's rows each, and meet at no barrier: while one is in its softmax, the other has the matrix units (FlashAttention-3,
Shah et al. 2024, section 3.1). Triton's interpreter knows no Gluon: these kernels are compared with their reference on a GPU alone.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ..kernel import Call, Candidate, Steps, claims
from ..target import SHARED_MEMORY_BYTES, Target
from .attention import Tile
from .causal_attention import is_plain, operands_of
from .ragged import tiles_of
from .source import launch, power_of_two
from .warpgroups import arrived, let_go


@gluon.jit
def copy_block(smem, cache, pages, start, length, kv_head, K: gl.constexpr, E: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Begin to copy keys `start` … start + BLOCK_N − 1 to shared memory; those from `length` on are zeros."""
    ROWS: gl.constexpr = min(BLOCK_N, PAGE)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    i = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    e = gl.arange(0, E, layout=gl.SliceLayout(0, layout))
    for part in gl.static_range(0, BLOCK_N, ROWS):
        first = start + part
        page = gl.load(pages + first // PAGE, mask=first < length, other=0)
        at = cache + ((page.to(gl.int64) * K + kv_head) * PAGE + first % PAGE) * E
        hopper.async_copy.async_copy_global_to_shared(smem.slice(part, ROWS), at + (i[:, None] * E + e[None, :]), mask=(first + i < length)[:, None])


@gluon.jit
def produce(k_smem, v_smem, k_full, v_full, k_free, v_free, k_cache, v_cache, pages, blocks, length, kv_head, K: gl.constexpr, E: gl.constexpr,
            F: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Copy every block's keys and values as soon as both consumers have let go of what lay in their place."""
    for block in range(0, blocks):
        stage = block % STAGES
        turn = block // STAGES % 2
        hopper.mbarrier.wait(k_free.index(stage), 1 - turn)
        copy_block(k_smem.index(stage), k_cache, pages, block * BLOCK_N, length, kv_head, K, E, PAGE, BLOCK_N)
        hopper.async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
        hopper.mbarrier.wait(v_free.index(stage), 1 - turn)
        copy_block(v_smem.index(stage), v_cache, pages, block * BLOCK_N, length, kv_head, K, F, PAGE, BLOCK_N)
        hopper.async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)


@gluon.jit
def softmax(scores, top, total, UNIT: gl.constexpr):
    """Weights of a block's keys, what the weights of earlier ones are multiplied with, and each row's new maximum and sum."""
    higher = gl.maximum(top, gl.max(scores, 1))
    origin = gl.where(higher == float("-inf"), 0.0, higher * UNIT)  # of a row that has seen nothing: its weights are 0 and not NaN
    weights = gl.exp2(scores * UNIT - origin[:, None])
    decay = gl.exp2(top * UNIT - origin)
    return weights, decay, higher, total * decay + gl.sum(weights, 1)


@gluon.jit
def fold(q_smem, k_smem, v_smem, k_full, v_full, k_free, v_free, acc, p, top, total, position, begin, stop, UNIT: gl.constexpr, BLOCK_N: gl.constexpr,
         STAGES: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """Fold keys of blocks `begin` … `stop` − 1 into (top, total) and those of the block before into acc; `p`: weights that are not in acc yet.

    MASKED: some query does not see some key. No branch decides that: the assembler would have every product end before it.
    """
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    i = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores_layout))
    nothing = gl.zeros([64, BLOCK_N], gl.float32, scores_layout)
    for block in range(begin, stop):
        stage = block % STAGES
        before = (block - 1) % STAGES
        arrived(k_full.index(stage), block // STAGES % 2)
        scores = hopper.warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        arrived(v_full.index(before), (block - 1) // STAGES % 2)
        begun = hopper.warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
        scores = hopper.warpgroup_mma_wait(1, deps=[scores])
        let_go(k_free.index(stage))
        if MASKED:
            scores = gl.where(block * BLOCK_N + i[None, :] <= position[:, None], scores, float("-inf"))
        weights, decay, top, total = softmax(scores, top, total, UNIT)
        acc = hopper.warpgroup_mma_wait(0, deps=[begun])
        let_go(v_free.index(before))
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
        p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    return acc, p, top, total


@gluon.jit
def consume(part: gl.constexpr, q_smem, k_smem, v_smem, k_full, v_full, k_free, v_free, sinks, out, start, begin, queries, earliest, blocks, length,
            kv_head, H: gl.constexpr, K: gl.constexpr, F: gl.constexpr, UNIT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """Rows 64 · `part` … of the tile."""
    GROUP: gl.constexpr = H // K
    BLOCK_Q: gl.constexpr = BLOCK_M // GROUP
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    dtype: gl.constexpr = out.dtype.element_ty
    q_smem = q_smem.slice(64 * part, 64)
    m = 64 * part + gl.arange(0, 64, layout=rows_layout)
    i = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores_layout))
    valid = (m < BLOCK_Q * GROUP) & (begin + m // GROUP < queries)
    # a row without a query takes part as one that sees all keys
    position = gl.where(valid, earliest + m // GROUP, length)
    acc = gl.zeros([64, F], gl.float32, acc_layout)
    top = gl.full([64], float("-inf"), gl.float32, rows_layout)
    total = gl.zeros([64], gl.float32, rows_layout)
    if blocks > 0:
        arrived(k_full.index(0), 0)
        scores = hopper.warpgroup_mma(q_smem, k_smem.index(0).permute((1, 0)), gl.zeros([64, BLOCK_N], gl.float32, scores_layout), use_acc=False)
        let_go(k_free.index(0))
        scores = gl.where(i[None, :] <= position[:, None], scores, float("-inf"))
        weights, _decay, top, total = softmax(scores, top, total, UNIT)
        p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, acc_layout, 2))
        seen = gl.maximum(gl.minimum(blocks, (earliest + 1) // BLOCK_N), 1)  # blocks before this one have keys that every query sees
        acc, p, top, total = fold(q_smem, k_smem, v_smem, k_full, v_full, k_free, v_free, acc, p, top, total, position,
                                  1, seen, UNIT, BLOCK_N, STAGES, False)  # fmt: skip
        acc, p, top, total = fold(q_smem, k_smem, v_smem, k_full, v_full, k_free, v_free, acc, p, top, total, position,
                                  seen, blocks, UNIT, BLOCK_N, STAGES, True)  # fmt: skip
        arrived(v_full.index((blocks - 1) % STAGES), (blocks - 1) // STAGES % 2)
        acc = hopper.warpgroup_mma(p, v_smem.index((blocks - 1) % STAGES), acc)
    if sinks is not None:
        sink = gl.load(sinks + kv_head * GROUP + m % GROUP, mask=valid, other=0.0).to(gl.float32) * 1.4426950408889634
        higher = gl.maximum(top * UNIT, sink)
        decay = gl.exp2(top * UNIT - higher)
        total = total * decay + gl.exp2(sink - higher)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc_layout))[:, None]
    total = gl.convert_layout(total, gl.SliceLayout(1, acc_layout))
    acc = acc * (1.0 / gl.where(total == 0.0, 1.0, total))[:, None]
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // F, F // 8], [4, 1], [1, 0])
    m = 64 * part + gl.arange(0, 64, layout=gl.SliceLayout(1, out_layout))
    row = (start + begin + m // GROUP).to(gl.int64) * H + kv_head * GROUP + m % GROUP
    valid = (m < BLOCK_Q * GROUP) & (begin + m // GROUP < queries)
    at = out + row[:, None] * F + gl.arange(0, F, layout=gl.SliceLayout(0, out_layout))[None, :]
    gl.store(at, gl.convert_layout(acc.to(dtype), out_layout), mask=valid[:, None])


@gluon.jit
def warpgroup_attention_kernel(q, k_cache, v_cache, cu_seqlens_q, seq_lens, page_table, sinks, out, num_tokens, num_seqs, num_columns, H: gl.constexpr,
                               K: gl.constexpr, E: gl.constexpr, F: gl.constexpr, PAGE: gl.constexpr, SCALE: gl.constexpr, BLOCK_M: gl.constexpr,
                               BLOCK_N: gl.constexpr, BLOCK_S: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    GROUP: gl.constexpr = H // K
    BLOCK_Q: gl.constexpr = BLOCK_M // GROUP
    UNIT: gl.constexpr = SCALE * 1.4426950408889634  # turns a score into units of log 2
    dtype: gl.constexpr = q.dtype.element_ty
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    place = gl.program_id(0) + gl.program_id(1) * gl.num_programs(0)
    kv_head = place % K
    s = gl.arange(0, BLOCK_S, layout=gl.BlockedLayout([1], [32], [4], [0]))
    # as `tile_of_rank` and `tile_of` of ragged.py
    starts = gl.load(cu_seqlens_q + s, mask=s <= num_seqs, other=0)
    some = gl.sum((gl.load(seq_lens + s, mask=s < num_seqs, other=0) > 0).to(gl.int32), 0)
    count = gl.load(cu_seqlens_q + some) // BLOCK_Q + some
    tile = gl.where(place // K < count, count - 1 - place // K, place // K)
    seq = gl.sum(((s <= num_seqs) & (starts // BLOCK_Q + s <= tile)).to(gl.int32), 0) - 1
    start = gl.load(cu_seqlens_q + seq)
    begin = (tile - start // BLOCK_Q - seq) * BLOCK_Q
    queries = gl.load(cu_seqlens_q + seq + 1, mask=seq < num_seqs, other=num_tokens) - start
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, E], gl.NVMMASharedLayout.get_default_for([BLOCK_N, E], dtype))
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, F], gl.NVMMASharedLayout.get_default_for([BLOCK_N, F], dtype))
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(k_full.index(stage), count=128)
        hopper.mbarrier.init(v_full.index(stage), count=128)
        hopper.mbarrier.init(k_free.index(stage), count=2)
        hopper.mbarrier.init(v_free.index(stage), count=2)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if begin < queries:
        length = gl.load(seq_lens + seq, mask=seq < num_seqs, other=0)
        earliest = length - queries + begin
        blocks = (gl.minimum(length, earliest + BLOCK_Q) + BLOCK_N - 1) // BLOCK_N
        pages = page_table + seq.to(gl.int64) * num_columns
        m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, q_layout))
        row = (start + begin + m // GROUP).to(gl.int64) * H + kv_head * GROUP + m % GROUP
        valid = (m < BLOCK_Q * GROUP) & (begin + m // GROUP < queries)
        h = gl.load(q + row[:, None] * E + gl.arange(0, E, layout=gl.SliceLayout(0, q_layout))[None, :], mask=valid[:, None], other=0.0)
        q_smem = gl.allocate_shared_memory(dtype, [BLOCK_M, E], gl.NVMMASharedLayout.get_default_for([BLOCK_M, E], dtype), h)
        hopper.fence_async_shared()
        gl.thread_barrier()
        gl.warp_specialize([
            (consume, (0, q_smem, k_smem, v_smem, k_full, v_full, k_free, v_free, sinks, out, start, begin, queries, earliest, blocks, length, kv_head, H, K, F,
                       UNIT, BLOCK_M, BLOCK_N, STAGES)),
            (consume, (1, q_smem, k_smem, v_smem, k_full, v_full, k_free, v_free, sinks, out, start, begin, queries, earliest, blocks, length, kv_head, H, K, F,
                       UNIT, BLOCK_M, BLOCK_N, STAGES)),
            (produce, (k_smem, v_smem, k_full, v_full, k_free, v_free, k_cache, v_cache, pages, blocks, length, kv_head, K, E, F, PAGE, BLOCK_N, STAGES)),
        ], [4, 4], [216, 72])  # fmt: skip


TILE = Tile(128, 128, 4, 4)
"""Rows and keys of a step of the softmax, warps of each task, and the most blocks in shared memory."""


@claims("paged_attention", "triton")
def warpgroup_attention(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    q, k_cache, v_cache = args["q"], args["k_cache"], args["v_cache"]
    tokens, heads, e = q.shape
    kv_heads, page_size, f = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    group = heads // kv_heads
    if target.arch != 90 or not is_plain(call, steps) or not {e, f} <= {64, 128}:
        return []
    seqs = args["page_table"].shape[0]
    group_rows, block_n = TILE.m // group, min(TILE.n, 2 * page_size)
    # the result is laid out anew on its way
    stages = min(TILE.stages, (SHARED_MEMORY_BYTES[target.isa] // q.dtype.itemsize // (e + f) - TILE.m) // block_n)
    if group_rows == 0 or stages < 2 or page_size % min(block_n, page_size):
        return []
    functions = [warpgroup_attention_kernel, consume, fold, let_go, arrived, softmax, produce, copy_block]
    constants = {"H": heads, "K": kv_heads, "E": e, "F": f, "PAGE": page_size, "SCALE": args["scale"], "BLOCK_M": TILE.m, "BLOCK_N": block_n,
                 "BLOCK_S": power_of_two(steps.max_seqs + 1), "STAGES": stages}  # fmt: skip
    one = launch(call, functions, operands_of(call), constants, (tiles_of(tokens, seqs, group_rows), (kv_heads, 1)), num_warps=TILE.warps, num_stages=stages)
    return [Candidate(f"warpgroups_m{TILE.m}_n{block_n}_s{stages}", (one,), rank=-2)]
