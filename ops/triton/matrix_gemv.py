"""A product of one row with 4-bit weights by the matrix units, from registers: what a thread loads is what it multiplies.

Each warp multiplies chunks of 128 columns of its own, of a panel's 16 rows, and nothing is shared before the end, where the warps' sums are added: no barrier
stands between a load and its product. Where there are more panels than programs, a program makes x ready once, and its loads run ahead of a panel's end. In
Gluon, where a program says which thread holds what. Triton's interpreter knows no Gluon: these kernels are compared with their reference on a GPU alone.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere

from ..formats.integer import PANEL
from ..kernel import Candidate, Operand
from .activations import activate, tanh
from .dequantize import MAGIC, nibble_pairs
from .linear import PROGRAMS
from .quantized_product import CHUNK, Product
from .source import launch

TILES = ((4, 1, 4, 0), (4, 2, 3, 0), (4, 4, 1, 0), (8, 1, 4, 0), (4, 2, 2, 3), (4, 1, 4, 3), (4, 2, 2, 2))
"""Warps, chunks of each in a step, steps whose loads are on their way, programs for each multiprocessor (0: one for each panel). By an exhaustive search of
those that fit, on an H100 (2026-11-26)."""
MOST_STEPS = 32
"""Of a panel: they are unrolled, and more take long to compile."""


@gluon.jit
def widened(words, away, magic, dtype: gl.constexpr):
    """Codes less `away` [RUNS · B, 16, 128 / RUNS] of words [B, 16, 4, RUNS, 4 / RUNS], a panel's chunks (layout "panels" of `formats.integer`); run r of
    chunk b is at r · B + b."""
    B: gl.constexpr = words.shape[0]
    RUNS: gl.constexpr = words.shape[3]
    even = gl.join(nibble_pairs(words, away, None, magic, 0, dtype), nibble_pairs(words, away, None, magic, 2, dtype))
    odd = gl.join(nibble_pairs(words, away, None, magic, 1, dtype), nibble_pairs(words, away, None, magic, 3, dtype))
    # b, n, t, run, j, h, bits 1 and 0 of q → run, b, n, j, q, t, h
    return gl.join(even, odd).permute((3, 0, 1, 4, 6, 7, 2, 5)).reshape([RUNS * B, 16, 128 // RUNS])


@gluon.jit
def load_words(panel, begin, wanted, WORDS: gl.constexpr, BLOCKS: gl.constexpr, WARPS: gl.constexpr):
    """Chunks `begin` … of a panel [BLOCKS, 16, 16], if they are wanted: 16 bytes for each thread, as the matrix units' left side is spread over a warp."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    b = begin + gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    n = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    i = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    at = panel + b * 256 + n * 16 + i
    if wanted is not None:
        return gl.load(at, mask=wanted & (b < WORDS // 16), other=0)
    elif WORDS // 16 % BLOCKS == 0:
        return gl.load(at)
    else:
        return gl.load(at, mask=b < WORDS // 16, other=0)


@gluon.jit
def load_scales(panel, begin, wanted, GROUP: gl.constexpr, SCALES: gl.constexpr, RUNS: gl.constexpr, BLOCKS: gl.constexpr, layout: gl.constexpr):
    """Their scales [RUNS · BLOCKS, 16] in `layout`."""
    b = gl.arange(0, RUNS * BLOCKS, gl.SliceLayout(1, layout))
    n = gl.arange(0, 16, gl.SliceLayout(0, layout))
    run = gl.minimum(((begin + b % BLOCKS) * 128 + b // BLOCKS * (128 // RUNS)) // GROUP, SCALES - 1)
    if wanted is not None:
        return gl.load(panel + run[:, None] * 16 + n[None, :], mask=wanted, other=0.0)
    else:
        return gl.load(panel + run[:, None] * 16 + n[None, :])


@gluon.jit
def load_zeros(panel, begin, GROUP: gl.constexpr, SCALES: gl.constexpr, RUNS: gl.constexpr, BLOCKS: gl.constexpr, layout: gl.constexpr):
    """Their zeros [BLOCKS, 16, 1, RUNS, 1], as `layout` has their words [BLOCKS, 16, 4, RUNS, 4 / RUNS]."""
    by_run: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, layout))
    b = begin + gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, by_run)))[:, None, None]
    n = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, by_run)))[None, :, None]
    r = gl.arange(0, RUNS, gl.SliceLayout(0, gl.SliceLayout(1, by_run)))[None, None, :]
    run = gl.minimum((b * 128 + r * (128 // RUNS)) // GROUP, SCALES - 1) if GROUP > 0 else 0
    return gl.load(panel + run * 16 + n + 0 * (b + r))[:, :, None, :, None]


@gluon.jit
def load_step(weight, scale, panel, wanted, step: gl.constexpr, N: gl.constexpr, WORDS: gl.constexpr, GROUP: gl.constexpr, SCALES: gl.constexpr,
              RUNS: gl.constexpr, BLOCKS: gl.constexpr, WARPS: gl.constexpr, GATED: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """A step's words and scales, if `wanted`; the same of the second weight, if there is one."""
    words = load_words(weight + panel.to(gl.int64) * (16 * WORDS), step * BLOCKS, wanted, WORDS, BLOCKS, WARPS)
    scales = 0
    if GROUP > 0:
        scales = load_scales(scale + panel * (16 * SCALES), step * BLOCKS, wanted, GROUP, SCALES, RUNS, BLOCKS, layout)
    loaded = (words, scales)
    if GATED:
        loaded += load_step(weight + N * WORDS, scale + N * SCALES, panel, wanted, step, N, WORDS, GROUP, SCALES, RUNS, BLOCKS, WARPS, False, layout)
    return loaded


@gluon.jit
def product(words, scales, zero, magic, begin, h, GROUP: gl.constexpr, SCALES: gl.constexpr, MIDDLE: gl.constexpr, RUNS: gl.constexpr, layout: gl.constexpr):
    """Products [RUNS · BLOCKS, 16, 8] in `layout` of chunks of a panel with those of the row h [RUNS · BLOCKS, 128 / RUNS, 8]."""
    BLOCKS: gl.constexpr = words.shape[0]
    BASE: gl.constexpr = 128.0 if h.dtype == gl.bfloat16 else 1024.0
    w = words.reshape([BLOCKS, 16, 4, RUNS, 4 // RUNS])
    if zero is not None:
        as_words: gl.constexpr = w.type.layout
        away = (load_zeros(zero, begin, GROUP, SCALES, RUNS, BLOCKS, as_words).to(gl.float32) + BASE).to(h.dtype)
    else:
        away = gl.to_tensor(BASE + MIDDLE).to(h.dtype)
    w = gl.convert_layout(widened(w, away, magic, h.dtype), gl.DotOperandLayout(0, layout, 2))
    part = ampere.mma_v2(w, h, gl.zeros([RUNS * BLOCKS, 16, 8], gl.float32, layout))
    if GROUP > 0:
        part *= scales.to(gl.float32)[:, :, None]
    return part


@gluon.jit
def multiply(held, row, weight, scale, zero, magic, panel, after, wanted, N: gl.constexpr, WORDS: gl.constexpr, GROUP: gl.constexpr, SCALES: gl.constexpr,
             MIDDLE: gl.constexpr, RUNS: gl.constexpr, BLOCKS: gl.constexpr, STEPS: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr,
             GATED: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Products of a panel, the first AHEAD of whose steps are held, with the row in shared memory; the same of the second weight; what is held then: of the
    panel `after`, if it is wanted."""
    PARTS: gl.constexpr = 4 if GATED else 2
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    sums: gl.constexpr = gl.SliceLayout(2, layout)
    acc = gl.zeros([RUNS * BLOCKS, 16, 8], gl.float32, layout)
    up = acc
    up_zero = None
    if zero is not None:
        zero += panel * (16 * SCALES)
        up_zero = zero + N * SCALES
    for step in gl.static_range(STEPS):
        if step + AHEAD < STEPS:
            held += load_step(weight, scale, panel, None, step + AHEAD, N, WORDS, GROUP, SCALES, RUNS, BLOCKS, WARPS, GATED, sums)
        elif wanted is not None:
            held += load_step(weight, scale, after, wanted, step + AHEAD - STEPS, N, WORDS, GROUP, SCALES, RUNS, BLOCKS, WARPS, GATED, sums)
        h = row.index(step).load(gl.SliceLayout(2, right))
        h = gl.broadcast(h[:, :, None], gl.zeros([RUNS * BLOCKS, 128 // RUNS, 8], h.dtype, right))[0]
        acc += product(held[step * PARTS], held[step * PARTS + 1], zero, magic, step * BLOCKS, h, GROUP, SCALES, MIDDLE, RUNS, layout)
        if GATED:
            up += product(held[step * PARTS + 2], held[step * PARTS + 3], up_zero, magic, step * BLOCKS, h, GROUP, SCALES, MIDDLE, RUNS, layout)
    return acc, up, held[STEPS * PARTS :]


@gluon.jit
def finish(acc, up, factor, scale, bias, residual, out, panel, N: gl.constexpr, GROUP: gl.constexpr, ACT: gl.constexpr):
    """Add a panel's products up; x was the same in all eight columns."""
    if ACT is not None:
        total, gate = gl.split(gl.sum(gl.sum(gl.join(acc, up), 0), 1) / 8)
        gate *= factor
    else:
        total = gl.sum(gl.sum(acc, 0), 1) / 8
    total *= factor
    n = panel * 16 + gl.arange(0, 16, total.type.layout)
    if GROUP == 0:
        total *= gl.load(scale + n).to(gl.float32)
        if ACT is not None:
            gate *= gl.load(scale + N + n).to(gl.float32)
    if ACT is not None:
        total = activate(total, ACT) * gate
    if bias is not None:
        total += gl.load(bias + n).to(gl.float32)
    if residual is not None:
        total += gl.load(residual + n).to(gl.float32)
    gl.store(out + n, total.to(out.dtype.element_ty))


@gluon.jit
def load_row(values, K: gl.constexpr, BLOCKS: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr):
    """The row at `values`, or () of None."""
    layout: gl.constexpr = gl.BlockedLayout([BLOCKS * 4 // WARPS], [32], [WARPS], [0])
    loaded = ()
    if values is not None:
        for step in gl.static_range(STEPS):
            k = step * BLOCKS * 128 + gl.arange(0, BLOCKS * 128, layout)
            loaded += (gl.load(values + k, mask=k < K, other=0.0),)
    return loaded


@gluon.jit
def make_ready(loaded, gains, row, K: gl.constexpr, RUNS: gl.constexpr, BLOCKS: gl.constexpr, STEPS: gl.constexpr, EPS: gl.constexpr,
               OFFSET: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """Put a row and the norm's weight, as `load_row` has them, multiplied into shared memory → what results are to be multiplied with."""
    layout: gl.constexpr = gl.BlockedLayout([BLOCKS * 4 // WARPS], [32], [WARPS], [0])
    squares = gl.zeros([BLOCKS * 128], gl.float32, layout)
    for step in gl.static_range(STEPS):
        h = gl.cast(loaded[step], gl.float32)
        squares += h * h
        if len(gains) > 0:
            h *= gains[step].to(gl.float32) + OFFSET
        h = h.to(row.dtype).reshape([BLOCKS, RUNS, 128 // RUNS]).permute((1, 0, 2)).reshape([RUNS * BLOCKS, 128 // RUNS])
        row.index(step).store(h)
    if EPS is not None:
        return gl.rsqrt(gl.sum(squares, 0) / K + EPS)
    else:
        return 1.0


@gluon.jit
def matrix_gemv_kernel(x, norm_weight, weight, scale, zero, bias, residual, out, magic, N: gl.constexpr, K: gl.constexpr, WORDS: gl.constexpr,
                       GROUP: gl.constexpr, SCALES: gl.constexpr, MIDDLE: gl.constexpr, EPS: gl.constexpr, OFFSET: gl.constexpr, ACT: gl.constexpr,
                       CHUNKS: gl.constexpr, AHEAD: gl.constexpr, ONCE: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """CHUNKS: of each warp in a step; AHEAD: steps whose loads are on their way; ONCE: there is a program for each panel."""
    GATED: gl.constexpr = ACT is not None
    RUNS: gl.constexpr = max(128 // GROUP, 1) if GROUP > 0 else 1
    BLOCKS: gl.constexpr = WARPS * CHUNKS
    STEPS: gl.constexpr = (WORDS // 16 + BLOCKS - 1) // BLOCKS
    PANELS: gl.constexpr = N // 16
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    first = gl.program_id(0)
    # the first of the weight is on its way before x is there
    held = ()
    for step in gl.static_range(AHEAD):
        held += load_step(weight, scale, first, None, step, N, WORDS, GROUP, SCALES, RUNS, BLOCKS, WARPS, GATED, gl.SliceLayout(2, layout))
    gains = load_row(norm_weight, K, BLOCKS, STEPS, WARPS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = gl.allocate_shared_memory(x.dtype.element_ty, [STEPS, RUNS * BLOCKS, 128 // RUNS], gl.SwizzledSharedLayout(8, 1, 1, [1, 0]))
    factor = make_ready(load_row(x, K, BLOCKS, STEPS, WARPS), gains, row, K, RUNS, BLOCKS, STEPS, EPS, OFFSET, WARPS)
    gl.thread_barrier()
    if ONCE:
        acc, up, held = multiply(held, row, weight, scale, zero, magic, first, 0, None, N, WORDS, GROUP, SCALES, MIDDLE, RUNS, BLOCKS, STEPS, AHEAD, WARPS,
                                 GATED, layout)  # fmt: skip
        finish(acc, up, factor, scale, bias, residual, out, first, N, GROUP, ACT)
    else:
        for panel in range(first, PANELS, gl.num_programs(0)):
            after = panel + gl.num_programs(0)
            acc, up, held = multiply(held, row, weight, scale, zero, magic, panel, after, after < PANELS, N, WORDS, GROUP, SCALES, MIDDLE, RUNS, BLOCKS, STEPS,
                                     AHEAD, WARPS, GATED, layout)  # fmt: skip
            finish(acc, up, factor, scale, bias, residual, out, panel, N, GROUP, ACT)


def matrix_gemvs(one: Product) -> list[Candidate]:
    """Of one row, which must have its weight in whole panels."""
    if one.weights.bits != 4 or one.weights.panel(one.width) != PANEL or one.target.arch < 80:
        return []
    operands = {n: Operand(arg=n) for n in ("x", "norm_weight", "weight", "scale", "zero", "bias", "residual")} | {
        "out": Operand(out=0), "magic": Operand(const=MAGIC[one.x.dtype])}  # fmt: skip
    functions = [matrix_gemv_kernel, make_ready, load_row, finish, multiply, product, load_step, load_zeros, load_scales, load_words, widened, nibble_pairs,
                 activate, tanh]  # fmt: skip
    constants = one.constants("BITS", "SCALE_ROWS", "X_GROUP", "PANEL") | {"EPS": one.call.args["eps"], "OFFSET": one.call.args["offset"]}
    panels, chunks = one.width // PANEL, -(-one.k // CHUNK)
    found = []
    for rank, (warps, each, ahead, programs) in enumerate(TILES):
        steps = -(-chunks // (warps * each))
        if steps > MOST_STEPS or warps * each >= 2 * chunks or (programs and panels <= programs * PROGRAMS):
            continue
        name = f"matrix_w{warps}_c{each}_a{min(ahead, steps)}" + (f"_p{programs}" if programs else "")
        blocks = constants | {"CHUNKS": each, "AHEAD": min(ahead, steps), "ONCE": programs == 0, "WARPS": warps}
        grid = ((programs * PROGRAMS or panels, 1),)
        found.append(Candidate(name, (launch(one.call, functions, operands, blocks, grid, num_warps=warps),), rank=rank / 100))
    return list({c.name: c for c in found}.values())
