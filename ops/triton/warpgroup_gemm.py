"""A product of many rows with 4-bit weights on Hopper: widening and matrix products at the same time, by two warpgroups that take turns.

Each warpgroup widens its rows of the weight in registers and multiplies them from there; while one does the first, the other has the matrix units. A third
one copies x to shared memory. A tile has more rows of the weight than of x: 4-bit weights are the cheaper ones to read again. In Gluon, where a program says
which warps do what: these kernels are compared with their reference on a GPU alone.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from ..formats.integer import PANEL
from ..kernel import Candidate, Operand
from .dequantize import MAGIC, nibble_pairs
from .linear import PROGRAMS
from .product_tile import FINISH_TILE, finish_tile, tile_at
from .quantized_gemm import parts_of_sums
from .quantized_product import Product
from .source import launch
from .warpgroups import arrived, let_go


@gluon.jit
def load_runs(values, panel, chunk, ROWS: gl.constexpr, GROUP: gl.constexpr, SCALES: gl.constexpr, RUNS: gl.constexpr):
    """Scales or zeros [4, 16, RUNS] of a chunk of four panels: of each run of its columns that shares one."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, RUNS], [1, 8, 4], [4, 1, 1], [2, 1, 0])
    p = panel + gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    n = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    r = gl.arange(0, RUNS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    run = gl.minimum((chunk * 128 + r * (128 // RUNS)) // GROUP, SCALES - 1) if GROUP > 0 else 0 * r
    return gl.load(values + (p * (16 * SCALES) + run * 16 + n), mask=p < ROWS // 16 + 0 * (n + r), other=0.0)


@gluon.jit
def load_chunk(weight, scale, zero, panel, apart, chunk, ROWS: gl.constexpr, WORDS: gl.constexpr, GROUP: gl.constexpr, SCALES: gl.constexpr,
               RUNS: gl.constexpr, BOTH: gl.constexpr):  # fmt: skip
    """Words [4, 16, 16] of a chunk of four panels, 16 bytes for each thread, as the matrix units' left side is spread over a warpgroup, their scales and zeros;
    with BOTH, those of the panels that are `apart` from them as well. The weight has ROWS rows."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [4, 1, 1], [2, 1, 0])
    p = panel + gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    n = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    i = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    words = gl.load(weight + p.to(gl.int64) * (16 * WORDS) + chunk * 256 + (n * 16 + i), mask=(p < ROWS // 16) & (chunk < WORDS // 16), other=0)
    scales = 0
    zeros = 0
    if GROUP > 0:
        scales = load_runs(scale, panel, chunk, ROWS, GROUP, SCALES, RUNS)
    if zero is not None:
        zeros = load_runs(zero, panel, chunk, ROWS, GROUP, SCALES, RUNS)
    loaded = (words, scales, zeros)
    if BOTH:
        loaded += load_chunk(weight, scale, zero, panel + apart, apart, chunk, ROWS, WORDS, GROUP, SCALES, RUNS, False)
    return loaded


@gluon.jit
def of_half(values, half: gl.constexpr, RUNS: gl.constexpr, layout: gl.constexpr):
    """Of scales or zeros those of 64 columns, [4, 16, 1, …], beside their words in `layout`."""
    if RUNS > 1:
        values = gl.split(values.reshape([4, 16, 2, RUNS // 2]).permute((0, 1, 3, 2)))[half]
    return gl.convert_layout(values, gl.SliceLayout(2, layout))[:, :, None, :]


@gluon.jit
def widened(words, scales, zeros, magic, half: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, MIDDLE: gl.constexpr, RUNS: gl.constexpr,
            dtype: gl.constexpr, left: gl.constexpr):  # fmt: skip
    """Columns 64 · `half` … of a chunk as `load_chunk` has it, [64, 64] in the layout `left`."""
    BASE: gl.constexpr = 128.0 if dtype == gl.bfloat16 else 1024.0
    w = gl.split(words.reshape([4, 16, 4, 2, 2]).permute((0, 1, 2, 4, 3)))[half]
    as_words: gl.constexpr = w.type.layout
    if ZERO:
        away = (of_half(zeros, half, RUNS, as_words).to(gl.float32) + BASE).to(dtype)
    else:
        away = gl.to_tensor(BASE + MIDDLE).to(dtype)
    by = None
    if GROUP > 0:
        by = of_half(scales, half, RUNS, as_words).to(dtype)
    even = gl.join(nibble_pairs(w, away, by, magic, 0, dtype), nibble_pairs(w, away, by, magic, 2, dtype))
    odd = gl.join(nibble_pairs(w, away, by, magic, 1, dtype), nibble_pairs(w, away, by, magic, 3, dtype))
    # p, n, t, j, h, bits 1 and 0 of q → p, n, j, q, t, h
    return gl.convert_layout(gl.join(even, odd).permute((0, 1, 3, 5, 6, 2, 4)).reshape([64, 64]), left)


@gluon.jit
def produce(x_smem, full, free, x, first_m, num_rows, start, steps, K: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr):
    """Copy 64 columns of x after the other as soon as both consumers have let go of what lay in their place. Words are on their way before x is there."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    k = gl.arange(0, 64, gl.SliceLayout(0, layout))
    at = x + m.to(gl.int64)[:, None] * K + k[None, :]
    for step in range(0, steps):
        stage = step % STAGES
        hopper.mbarrier.wait(free.index(stage), 1 - step // STAGES % 2)
        begin = start + step * 64
        if K % 64 == 0:
            mask = (m < num_rows)[:, None] & (begin < K)
        else:
            mask = (m < num_rows)[:, None] & (begin + k < K)[None, :]
        hopper.async_copy.async_copy_global_to_shared(x_smem.index(stage), at + begin, mask=mask)
        hopper.async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def consume(part: gl.constexpr, x_smem, full, free, weight, scale, zero, bias, residual, out, partial, tickets, magic, first_n, first_m, num_rows, start,
            chunks, N: gl.constexpr, WORDS: gl.constexpr, GROUP: gl.constexpr, SCALES: gl.constexpr, MIDDLE: gl.constexpr, ACT: gl.constexpr,
            BLOCK_M: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr):  # fmt: skip
    """Two times 64 rows of the weight: those of a gate and of what it gates, or 128 that follow each other. Of each step of x a product with the ones and one
    with the others: the next one's weights are widened while a product is on its way."""
    dtype: gl.constexpr = out.dtype.element_ty
    RUNS: gl.constexpr = max(128 // GROUP, 1) if GROUP > 0 else 1
    GATED: gl.constexpr = ACT is not None
    ZERO: gl.constexpr = zero is not None
    ROWS: gl.constexpr = 2 * N if GATED else N
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    n = first_n + (64 if GATED else 128) * part
    panel = n // 16
    apart = N // 16 if GATED else 4
    held = load_chunk(weight, scale, zero, panel, apart, start, ROWS, WORDS, GROUP, SCALES, RUNS, True)
    h = gl.zeros([64, BLOCK_M], gl.float32, layout)
    u = h
    a = widened(held[0], held[1], held[2], magic, 0, GROUP, ZERO, MIDDLE, RUNS, dtype, left)
    for chunk in range(0, chunks):
        after = load_chunk(weight, scale, zero, panel, apart, start + chunk + 1, ROWS, WORDS, GROUP, SCALES, RUNS, True)
        stage = 2 * chunk % STAGES
        turn = 2 * chunk // STAGES % 2
        x_0 = x_smem.index(stage).permute((1, 0))
        x_1 = x_smem.index(stage + 1).permute((1, 0))
        arrived(full.index(stage), turn)
        h = hopper.warpgroup_mma(a, x_0, h, is_async=True)
        b = widened(held[3], held[4], held[5], magic, 0, GROUP, ZERO, MIDDLE, RUNS, dtype, left)
        u = hopper.warpgroup_mma(b, x_0, u, is_async=True)
        h = hopper.warpgroup_mma_wait(1, deps=[h])
        a = widened(held[0], held[1], held[2], magic, 1, GROUP, ZERO, MIDDLE, RUNS, dtype, left)
        arrived(full.index(stage + 1), turn)
        h = hopper.warpgroup_mma(a, x_1, h, is_async=True)
        u = hopper.warpgroup_mma_wait(1, deps=[u])
        let_go(free.index(stage))
        b = widened(held[3], held[4], held[5], magic, 1, GROUP, ZERO, MIDDLE, RUNS, dtype, left)
        u = hopper.warpgroup_mma(b, x_1, u, is_async=True)
        h = hopper.warpgroup_mma_wait(1, deps=[h])
        a = widened(after[0], after[1], after[2], magic, 0, GROUP, ZERO, MIDDLE, RUNS, dtype, left)
        # no product may be on its way over the loop's end: the assembler would have every one end before the next
        u = hopper.warpgroup_mma_wait(0, deps=[u])
        let_go(free.index(stage + 1))
        held = after
    by_column: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    h = gl.convert_layout(h, by_column)
    u = gl.convert_layout(u, by_column)
    n = n + gl.arange(0, 64, gl.SliceLayout(1, by_column))[:, None]
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, by_column))[None, :]
    if GROUP == 0:
        h *= gl.load(scale + n, mask=n < N, other=0.0).to(gl.float32)
        u *= gl.load(scale + n + apart * 16, mask=n + apart * 16 < ROWS, other=0.0).to(gl.float32)
    tiles = gl.num_programs(0) * gl.num_programs(1)
    ticket = tickets
    other_ticket = tickets
    if SPLIT > 1:
        ticket += 2 * part * tiles
        other_ticket += (2 * part + 1) * tiles
    if GATED:
        finish_tile(h, u, bias, residual, out, partial, ticket, m, n, num_rows, N, SPLIT, ACT)
    else:
        finish_tile(h, h, bias, residual, out, partial, ticket, m, n, num_rows, N, SPLIT, ACT)
        finish_tile(u, u, bias, residual, out, partial, other_ticket, m, n + 64, num_rows, N, SPLIT, ACT)


@gluon.jit
def warpgroup_gemm_kernel(x, weight, scale, zero, bias, residual, out, partial, tickets, magic, num_rows, N: gl.constexpr, K: gl.constexpr,
                          WORDS: gl.constexpr, GROUP: gl.constexpr, SCALES: gl.constexpr, MIDDLE: gl.constexpr, ACT: gl.constexpr, BLOCK_N: gl.constexpr,
                          BLOCK_M: gl.constexpr, STAGES: gl.constexpr, HEIGHT: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """STAGES: of 64 columns of x in shared memory, an even number."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    DEPTH: gl.constexpr = (WORDS // 16 + SPLIT - 1) // SPLIT
    first_n, first_m = tile_at(BLOCK_N, BLOCK_M, HEIGHT)
    start = gl.program_id(2) * DEPTH
    chunks = gl.minimum(DEPTH, WORDS // 16 - start)
    dtype: gl.constexpr = x.dtype.element_ty
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, 64], gl.NVMMASharedLayout.get_default_for([BLOCK_M, 64], dtype))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(stage), count=128)
        hopper.mbarrier.init(free.index(stage), count=2)
    hopper.fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize([
        (consume, (0, x_smem, full, free, weight, scale, zero, bias, residual, out, partial, tickets, magic, first_n, first_m, num_rows, start, chunks, N,
                   WORDS, GROUP, SCALES, MIDDLE, ACT, BLOCK_M, STAGES, SPLIT)),
        (consume, (1, x_smem, full, free, weight, scale, zero, bias, residual, out, partial, tickets, magic, first_n, first_m, num_rows, start, chunks, N,
                   WORDS, GROUP, SCALES, MIDDLE, ACT, BLOCK_M, STAGES, SPLIT)),
        (produce, (x_smem, full, free, x, first_m, num_rows, start * 128, chunks * 2, K, BLOCK_M, STAGES, PDL)),
    ], [4, 4], [232, 40])  # fmt: skip


ROWS, STAGES, HEIGHT = 128, 6, 8
"""Rows of x in a tile, steps of x in shared memory, row tiles whose programs run together."""
MOST_SPLITS = 4
"""Of K: what they cost grows with the rows."""


def warpgroup_gemms(one: Product) -> list[Candidate]:
    """With a weight in whole panels; where that gives few tiles, K is also split over as many programs as fill the GPU."""
    if one.weights.bits != 4 or one.weights.panel(one.width) != PANEL or one.target.arch != 90 or one.steps.deterministic:
        return []
    operands = {n: Operand(arg=n) for n in ("x", "weight", "scale", "zero", "bias", "residual")} | {"out": Operand(out=0)}
    sizes = {"magic": Operand(const=MAGIC[one.x.dtype]), "num_rows": Operand(size=one.tokens)}
    functions = [warpgroup_gemm_kernel, consume, produce, widened, of_half, load_chunk, load_runs, let_go, arrived, nibble_pairs, tile_at, *FINISH_TILE]
    width = 256 if one.act is None else 128
    blocks = one.constants("BITS", "SCALE_ROWS", "X_GROUP", "PANEL") | {"BLOCK_N": width, "BLOCK_M": ROWS, "STAGES": STAGES, "HEIGHT": HEIGHT}
    tiles = -(-one.rows // ROWS) * -(-one.width // width)
    first = 256 <= one.rows <= 2048 or one.act is not None  # where it is the fastest, as a rule: without a tuning table that decides
    found: list[Candidate] = []
    for split in dict.fromkeys((max(1, min(PROGRAMS // tiles, MOST_SPLITS)), 1)):
        parts, absent, scratch = parts_of_sums(one, split, 4 * tiles)  # a ticket for each 64 rows of the weight
        grid = ((one.tokens, ROWS), (one.width, width), (split, 1))
        this = launch(one.call, functions, operands | parts | sizes, blocks | absent | {"SPLIT": split}, grid, scratch=scratch, num_warps=4, num_stages=STAGES)
        name = f"warpgroups_n{width}_m{ROWS}_s{STAGES}" + (f"_split{split}" if split > 1 else "")
        found.append(Candidate(name, (this,), scratch, (-2 if first else 0.15) + len(found) / 10))
    return found
