"""A GEMM with quantized weights and 16-bit activations: weights are widened in registers and multiplied from there.

Groups' scales multiply the sum of a group's products where x has few rows, else the weights: what costs less. With few rows, loops that take two blocks of
columns in a step are often faster (`Tile.unroll`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..kernel import Candidate, Operand
from .dequantize import MAGIC, nibble_pairs, register_rows, runs_of, widen_bytes, widen_nibbles
from .prefetch import prefetch_rows
from .product_tile import early_sum, finish_tile, tile_at
from .quantized_gemm import Tile, Tiles, gemm, tiles
from .quantized_product import Product, begin_of, word_of

TILES = Tiles(
    few=(Tile(128, 16, 128, 8, 3, 2), Tile(64, 16, 128, 4, 2, 2), Tile(128, 16, 128, 8, 3), Tile(64, 16, 128, 4, 4, 2), Tile(64, 16, 128, 4, 3),
         Tile(256, 16, 128, 8, 4), Tile(64, 16, 128, 4, 6), Tile(64, 16, 128, 4, 2, 2, 2)),
    some=(Tile(64, 64, 128, 4, 4), Tile(64, 32, 128, 4, 3, 2), Tile(64, 64, 128, 4, 3, 2), Tile(64, 32, 128, 4, 4, 2), Tile(128, 64, 128, 8, 4),
          Tile(64, 32, 128, 4, 6), Tile(128, 32, 128, 8, 4)),
    many=(Tile(128, 128, 128, 8, 4), Tile(128, 64, 128, 4, 4), Tile(128, 256, 128, 8, 3), Tile(64, 128, 128, 4, 4)),
    gated_some=(Tile(64, 64, 128, 4, 4), Tile(128, 64, 128, 8, 4), Tile(128, 64, 128, 8, 3, 2), Tile(64, 32, 128, 4, 5), Tile(128, 32, 128, 8, 4)),
    gated_many=(Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3), Tile(128, 64, 128, 8, 4), Tile(64, 64, 128, 4, 5)),
)  # fmt: skip
"""Rows of the weight are 16 for each warp, or a multiple: see `register_rows`. Tiles by an exhaustive search of those that fit, on an H100 (2026-11-26;
those of up to 64 rows 2026-11-28)."""


@triton.jit
def widen_tile(row, zero, scale, magic, begin, K: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, BLOCK_K: tl.constexpr,
               EVEN: tl.constexpr, WARPS: tl.constexpr, PANEL: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Columns `begin` … of the weight's rows at pointers row [N], in `dtype`."""
    PER_WORD: tl.constexpr = 8 if BITS == 4 else 1
    j = begin // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
    at = row[:, None] + (word_of(begin, BLOCK_K // PER_WORD, PANEL) if BITS == 4 else j)[None, :]
    if EVEN:
        codes = tl.load(at)
    else:
        codes = tl.load(at, mask=(j < WORDS)[None, :], other=0.0)
    if BITS == 4:
        return widen_nibbles(codes, zero, scale, magic, dtype, MIDDLE, WARPS)
    else:
        return widen_bytes(codes, zero, scale, dtype, MIDDLE)


@triton.jit
def prefetch_groups(values, apart, PANELS: tl.constexpr, COUNT: tl.constexpr, ACT: tl.constexpr, THREADS: tl.constexpr):
    """Ask for COUNT scales or zeros at each of PANELS pointers; of gated products also for those that are `apart` from them."""
    prefetch_rows(values, PANELS, COUNT * values.dtype.element_ty.primitive_bitwidth // 8, THREADS)
    if ACT is not None:
        prefetch_rows(values + apart, PANELS, COUNT * values.dtype.element_ty.primitive_bitwidth // 8, THREADS)


@triton.jit
def weight_only_gemm_kernel(x, weight, scale, zero, magic, bias, residual, out, partial, tickets, num_rows, N: tl.constexpr, K: tl.constexpr,
                            WORDS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr,
                            MIDDLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, HEIGHT: tl.constexpr,
                            SPLIT: tl.constexpr, ACT: tl.constexpr, PANEL: tl.constexpr, THREADS: tl.constexpr, PREFETCH: tl.constexpr,
                            UNROLL: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Scales and zeros of a group are asked for while the group before is multiplied."""
    dtype: tl.constexpr = x.dtype.element_ty
    WARPS: tl.constexpr = THREADS // 32
    EVEN: tl.constexpr = K % (SPLIT * BLOCK_K) == 0
    EACH: tl.constexpr = GROUP if GROUP > 0 else 128
    RUNS: tl.constexpr = max(BLOCK_K // EACH, 1) if GROUP > 0 else 1
    # of a product that is on its way over the loop's end, the assembler has each step end before the next begins; a sum that is scaled in the loop has ended
    FOLD: tl.constexpr = GROUP > 0 and (RUNS > 1 or BLOCK_M > 64)
    first_n, first_m = tile_at(BLOCK_N, BLOCK_M, HEIGHT)
    n = first_n + tl.arange(0, BLOCK_N)
    m = first_m + tl.arange(0, BLOCK_M)
    held = tl.minimum(first_n + (register_rows(BLOCK_N, WARPS) if BITS == 4 else tl.arange(0, BLOCK_N)), N - 1).to(tl.int64)
    depth: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    start = tl.program_id(2) * depth
    row = weight + begin_of(held, WORDS, 16, PANEL)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            panels = tl.minimum(first_n + tl.arange(0, BLOCK_N // PANEL) * PANEL, N - PANEL).to(tl.int64)
            ahead = weight + panels * WORDS + start * WORDS // K * PANEL
            prefetch_rows(ahead, BLOCK_N // PANEL, PREFETCH * PANEL, THREADS)
            if ACT is not None:
                prefetch_rows(ahead + N * WORDS, BLOCK_N // PANEL, PREFETCH * PANEL, THREADS)
            if BITS == 4 and GROUP > 0 and EVEN and depth % EACH == 0:  # from memory they would come later than the loop wants them
                groups = panels * SCALES + start // EACH * PANEL
                prefetch_groups(scale + groups, N * SCALES, BLOCK_N // PANEL, depth // EACH * PANEL, ACT, THREADS)
                if zero is not None:
                    prefetch_groups(zero + groups, N * SCALES, BLOCK_N // PANEL, depth // EACH * PANEL, ACT, THREADS)
    k = tl.arange(0, BLOCK_K)
    x_row = x + tl.minimum(m, num_rows - 1).to(tl.int64)[None, :] * K + k[:, None]
    valid = (m < num_rows)[None, :]
    scaled = held if FOLD else tl.minimum(n, N - 1).to(tl.int64)
    scale_row = scale + begin_of(scaled // SCALE_ROWS, SCALES, 1, PANEL)
    up_scale_row = scale + begin_of((scaled + N) // SCALE_ROWS, SCALES, 1, PANEL)
    s = None
    t = None
    z = None
    y = None
    if GROUP > 0:
        s = runs_of(scale_row, start, EACH, SCALES, RUNS, PANEL)
        if ACT is not None:
            t = runs_of(up_scale_row, start, EACH, SCALES, RUNS, PANEL)
    if zero is not None:
        zero_row = zero + begin_of(held, SCALES, 1, PANEL)
        z = runs_of(zero_row, start, EACH, SCALES, RUNS, PANEL).to(dtype)
        if ACT is not None:
            y = runs_of(zero_row + N * SCALES, start, EACH, SCALES, RUNS, PANEL).to(dtype)
    if GROUP == 0:  # what is needed at the end is asked for at the beginning
        by = tl.load(scale_row)
        if ACT is not None:
            up_by = tl.load(up_scale_row)
    if PDL:
        tl.extra.cuda.gdc_wait()
    EARLY: tl.constexpr = residual is not None and ACT is None and BLOCK_N * BLOCK_M <= 16 * THREADS
    if EARLY:
        added = early_sum(residual, m[None, :], n[:, None], num_rows, N)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = acc
    for begin in tl.range(start, start + depth, BLOCK_K, loop_unroll_factor=UNROLL):
        if EVEN:
            h = tl.load(x_row + begin, mask=valid, other=0.0)
        else:
            h = tl.load(x_row + begin, mask=(begin + k < K)[:, None] & valid, other=0.0)
        w = widen_tile(row, z, s.to(dtype) if FOLD else None, magic, begin, K, WORDS, BITS, MIDDLE, BLOCK_K, EVEN, WARPS, PANEL, dtype)
        if GROUP > 0 and not FOLD:
            acc += tl.dot(w, h) * s.to(tl.float32)
        else:
            acc = tl.dot(w, h, acc)
        if ACT is not None:
            v = widen_tile(row + N * WORDS, y, t.to(dtype) if FOLD else None, magic, begin, K, WORDS, BITS, MIDDLE, BLOCK_K, EVEN, WARPS, PANEL, dtype)
            if GROUP > 0 and not FOLD:
                up += tl.dot(v, h) * t.to(tl.float32)
            else:
                up = tl.dot(v, h, up)
        if GROUP > 0:
            s = runs_of(scale_row, begin + BLOCK_K, EACH, SCALES, RUNS, PANEL)
            if ACT is not None:
                t = runs_of(up_scale_row, begin + BLOCK_K, EACH, SCALES, RUNS, PANEL)
            if zero is not None:
                z = runs_of(zero_row, begin + BLOCK_K, EACH, SCALES, RUNS, PANEL).to(dtype)
                if ACT is not None:
                    y = runs_of(zero_row + N * SCALES, begin + BLOCK_K, EACH, SCALES, RUNS, PANEL).to(dtype)
    if GROUP == 0:
        acc *= by.to(tl.float32)[:, None]
        if ACT is not None:
            up *= up_by.to(tl.float32)[:, None]
    if EARLY:
        acc += added.to(tl.float32)
    finish_tile(acc, up, bias, None if EARLY else residual, out, partial, tickets, m[None, :], n[:, None], num_rows, N, SPLIT, ACT)


def weight_only_gemms(product: Product) -> list[Candidate]:
    operands = {n: Operand(arg=n) for n in ("x", "weight", "scale", "zero")} | {"magic": Operand(const=MAGIC[product.x.dtype])}
    functions = [weight_only_gemm_kernel, prefetch_groups, begin_of, word_of, widen_tile, widen_nibbles, nibble_pairs, register_rows, widen_bytes, runs_of]
    return [gemm(product, functions, operands, product.constants("X_GROUP") | {"UNROLL": t.unroll}, t) for t in tiles(product, TILES)]
