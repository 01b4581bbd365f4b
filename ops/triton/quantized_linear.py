"""Products with quantized weights: a GEMV for one row, and a GEMM whose tiles are weight · xᵀ, so that weights are widened in registers.

Three ways to multiply: codes of both sides on the matrix units for 8 bits (activations that are rounded to the weight's kind);
8-bit codes widened to the activations' type; 4-bit codes put under the exponent of 128 (bfloat16) or 1024 (float16), which makes
two numbers in two instructions, and taken from it. Scales that a row shares are applied at the end, those of a group to the sum of its products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from .. import formats
from ..chain import chain
from ..dims import product
from ..formats.fp8 import BLOCK, Fp8
from ..formats.integer import Integer
from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claimants, claims
from ..quantize import LARGEST
from ..target import SHARED_MEMORY_BYTES, Target
from .activations import activate, tanh
from .linear import PROGRAMS, sum_splits_kernel
from .prefetch import prefetch_rows
from .quantize import row_scale, to_eight_bits
from .source import FLOATS, launch, most, power_of_two, supported

ROUNDINGS = {torch.float8_e4m3fn: "fp8_e4m3", torch.int8: "int8"}
LARGEST_SCRATCH = 1 << 30
"""Bytes that a weight may take when it is dequantized as a whole."""
PLANES = 128
"""Columns that lie together in the 4-bit layout: 16 words, whose nibbles q are columns 16 q … 16 q + 15."""


@triton.jit
def quantize_rows_kernel(x, norm_weight, input_scale, codes, scales, num_rows, K: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr,
                         EPS: tl.constexpr, OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program rounds BLOCK_M rows, with EPS normalized first, or GROUP columns of them; scales [rows, groups]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    group = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    k = group * GROUP + tl.arange(0, BLOCK_K)[None, :]
    mask = (m < num_rows) & (k < K) & (k < (group + 1) * GROUP)
    at = m.to(tl.int64) * K + k
    h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if EPS is not None:
        h *= tl.rsqrt(tl.sum(h * h, 1) / K + EPS)[:, None]
        if norm_weight is not None:
            h *= tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32) + OFFSET
    if input_scale is not None:
        by = tl.load(input_scale) + tl.zeros([BLOCK_M, 1], tl.float32)
    else:
        by = row_scale(h, LARGEST)
    tl.store(scales + m * tl.num_programs(1) + group, by, mask=m < num_rows)
    tl.store(codes + at, to_eight_bits(h, by, codes.dtype.element_ty, LARGEST), mask=mask)


@triton.jit
def nibble(words, Q: tl.constexpr):
    """16 + nibble Q of each word, in float32: the nibble becomes the first bits of the mantissa."""
    placed = words << (19 - 4 * Q) if Q < 5 else words >> (4 * Q - 19)
    return ((placed & 0x00780000) | 0x41800000).to(tl.float32, bitcast=True)


@triton.jit
def rounded_row(h, by, ROUND: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr):
    """A row [1, N] as eight bits say it: in units of `by` [1, 1], or, with groups of their own scales, dequantized."""
    dtype: tl.constexpr = tl.int8 if ROUND == "int8" else tl.float8e4nv
    if GROUP > 0:
        groups = tl.reshape(h, [h.shape[1] // GROUP, GROUP])
        each = row_scale(groups, LARGEST)
        return tl.reshape(to_eight_bits(groups, each, dtype, LARGEST).to(tl.float32) * each, h.shape)
    else:
        return to_eight_bits(h, by, dtype, LARGEST).to(tl.float32)


@triton.jit
def columns_of(x, norm_weight, k, K: tl.constexpr, OFFSET: tl.constexpr):
    """Columns k of the row x, times the norm's weight if there is one."""
    h = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if norm_weight is not None:
        h *= tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32) + OFFSET
    return h


@triton.jit
def row_product(row, scale_row, zero_row, x, norm_weight, begin, by, K: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                MIDDLE: tl.constexpr, ROUND: tl.constexpr, X_GROUP: tl.constexpr, LARGEST: tl.constexpr, OFFSET: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """Products [BLOCK_N, BLOCK_K / (8 or 1)] of a block of weight rows with x, to be added up."""
    if BITS == 4:
        j = begin // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
        inside = j < WORDS
        words = tl.load(row + j, mask=inside, other=0)
        acc = tl.zeros(words.shape, tl.float32)
        total = tl.zeros([1, BLOCK_K // 8], tl.float32)
        PER: tl.constexpr = min(GROUP, 128) // 16 if GROUP > 0 else 8
        for first in tl.static_range(0, 8, PER):
            part = tl.zeros(words.shape, tl.float32)
            total = tl.zeros([1, BLOCK_K // 8], tl.float32)
            for q in tl.static_range(PER):
                k = j // 16 * 128 + (first + q) * 16 + j % 16
                h = columns_of(x, norm_weight, k, K, OFFSET)
                total += h
                part += nibble(words, first + q) * h
            if GROUP > 0:
                group = (j // 16 * 128 + first * 16) // GROUP
                away = 16.0 + MIDDLE
                if zero_row is not None:
                    away = 16.0 + tl.load(zero_row + group, mask=inside, other=0.0).to(tl.float32)
                acc += (part - away * total) * tl.load(scale_row + group, mask=inside, other=0.0).to(tl.float32)
            else:
                away = 16.0 + MIDDLE
                if zero_row is not None:
                    away = 16.0 + tl.load(zero_row).to(tl.float32)
                acc += part - away * total
        return acc
    else:
        k = begin + tl.arange(0, BLOCK_K)[None, :]
        w = tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)
        h = columns_of(x, norm_weight, k, K, OFFSET)
        if ROUND is not None:
            h = rounded_row(h, by, ROUND, X_GROUP, LARGEST)
        if zero_row is not None:
            w += MIDDLE - tl.load(zero_row + (k // GROUP if GROUP > 0 else 0), mask=k < K, other=0.0).to(tl.float32)
        if GROUP > 0:
            w *= tl.load(scale_row + k // GROUP, mask=k < K, other=0.0).to(tl.float32)
        return w * h


@triton.jit
def quantized_gemv_kernel(x, norm_weight, input_scale, weight, scale, zero, bias, residual, out, N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr,
                          BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr, MIDDLE: tl.constexpr,
                          ROUND: tl.constexpr, X_GROUP: tl.constexpr, LARGEST: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
                          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACT: tl.constexpr, THREADS: tl.constexpr, PREFETCH: tl.constexpr,
                          PDL: tl.constexpr):  # fmt: skip
    """One row of x, which every program normalizes and rounds for itself: a norm's factor multiplies the result, or the scale of codes.

    A row of the weight has WORDS elements of memory and SCALES scales; SCALE_ROWS rows share them.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(n, N - 1).to(tl.int64)
    row = weight + inside * WORDS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch_rows(row, BLOCK_N, PREFETCH, THREADS)
            if ACT is not None:
                prefetch_rows(row + N * WORDS, BLOCK_N, PREFETCH, THREADS)
        tl.extra.cuda.gdc_wait()
    by = tl.zeros([1, 1], tl.float32)
    factor = tl.full([1, 1], 1.0, tl.float32)
    biggest = tl.zeros([1, BLOCK_K], tl.float32)
    squares = tl.zeros([1, BLOCK_K], tl.float32)
    if EPS is not None or (ROUND is not None and X_GROUP == 0 and input_scale is None):
        for begin in tl.static_range(0, K, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)[None, :]
            if EPS is not None:
                h = columns_of(x, None, k, K, OFFSET)
                squares += h * h
            if ROUND is not None:
                biggest = tl.maximum(biggest, tl.abs(columns_of(x, norm_weight, k, K, OFFSET)))
    if EPS is not None:
        factor = tl.rsqrt(tl.sum(squares, 1) / K + EPS)[:, None]
    if ROUND is not None:
        if X_GROUP == 0 and input_scale is None:
            by = row_scale(biggest, LARGEST)  # of x before it is normalized, as are the codes
        elif input_scale is not None:
            by = tl.load(input_scale) / factor
    row = row[:, None]
    scale_row = scale + (inside // SCALE_ROWS * SCALES)[:, None]
    zero_row = None
    up_zero = None
    if zero is not None:
        zero_row = zero + (inside * SCALES)[:, None]
        up_zero = zero_row + N * SCALES
    up_scale = scale + ((inside + N) // SCALE_ROWS * SCALES)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_K // 8 if BITS == 4 else BLOCK_K], tl.float32)
    up = acc
    for begin in tl.static_range(0, K, BLOCK_K):
        acc += row_product(row, scale_row, zero_row, x, norm_weight, begin, by, K, WORDS, BITS, GROUP, MIDDLE, ROUND, X_GROUP, LARGEST, OFFSET,
                           BLOCK_K)  # fmt: skip
        if ACT is not None:
            up += row_product(row + N * WORDS, up_scale, up_zero, x, norm_weight, begin, by, K, WORDS, BITS, GROUP, MIDDLE, ROUND, X_GROUP, LARGEST,
                              OFFSET, BLOCK_K)  # fmt: skip
    h = tl.sum(acc, 1)
    u = tl.sum(up, 1)
    if GROUP == 0:
        h *= tl.load(scale + inside).to(tl.float32)
        if ACT is not None:
            u *= tl.load(scale + N + inside).to(tl.float32)
    if ROUND is not None and X_GROUP == 0:
        factor *= by
    h *= tl.sum(factor)
    u *= tl.sum(factor)
    if ACT is not None:
        h = activate(h, ACT) * u
    if bias is not None:
        h += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, h.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def nibbles(words, Q: tl.constexpr, MIDDLE: tl.constexpr, dtype: tl.constexpr):
    """Nibble Q of each word, less MIDDLE, in a 16-bit float, exactly."""
    both = (words >> (4 * (Q % 4))) & 0x000F000F  # nibbles Q % 4 and Q % 4 + 4
    if dtype == tl.bfloat16:
        both = both | 0x43004300
        base = 128.0
    else:
        both = both | 0x64006400
        base = 1024.0
    if Q >= 4:
        both = both >> 16
    return both.to(tl.int16).to(dtype, bitcast=True) - tl.full([], base + MIDDLE, dtype)


@triton.jit
def tile_product(row, scale_row, zero_row, x_row, x_scale_row, begin, valid, K: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr,
                 GROUP: tl.constexpr, SCALES: tl.constexpr, MIDDLE: tl.constexpr, X_GROUP: tl.constexpr, X_SCALES: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, acc):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] + weight [BLOCK_N, BLOCK_K] · x [BLOCK_M, BLOCK_K]ᵀ of columns `begin` on, groups' scales applied."""
    dtype: tl.constexpr = x_row.dtype.element_ty
    if BITS == 4:
        j = begin // 8 + tl.arange(0, 16)
        words = tl.load(row[:, None] + j[None, :], mask=(j < WORDS)[None, :], other=0)
        i = tl.arange(0, 16)
        PER: tl.constexpr = min(GROUP, 128) // 16 if GROUP > 0 else 8
        for first in tl.static_range(0, 8, PER):
            group = tl.minimum((begin + first * 16) // GROUP, SCALES - 1) if GROUP > 0 else 0
            part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) if GROUP > 0 else acc
            if zero_row is not None:
                away = tl.load(zero_row + group).to(dtype)[:, None]
            for q in tl.static_range(PER):
                k = begin + (first + q) * 16 + i
                h = tl.load(x_row[None, :] + k[:, None], mask=(k < K)[:, None] & valid, other=0.0)
                if zero_row is not None:
                    w = nibbles(words, first + q, 0, dtype) - away
                else:
                    w = nibbles(words, first + q, MIDDLE, dtype)
                part = tl.dot(w, h, part)
            if GROUP > 0:
                acc += part * tl.load(scale_row + group).to(tl.float32)[:, None]
            else:
                acc = part
        return acc
    else:
        k = begin + tl.arange(0, BLOCK_K)
        w = tl.load(row[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
        h = tl.load(x_row[None, :] + k[:, None], mask=(k < K)[:, None] & valid, other=0.0)
        group = tl.minimum(begin // GROUP, SCALES - 1) if GROUP > 0 else 0  # splits of K may end in blocks without columns
        if zero_row is not None:
            away = MIDDLE - tl.load(zero_row + group).to(tl.float32)
            w = (w.to(tl.float32) + away[:, None]).to(dtype)
        elif w.dtype != dtype:
            w = w.to(dtype)
        if GROUP > 0 or X_GROUP > 0:
            part = tl.dot(w, h, out_dtype=tl.int32 if dtype == tl.int8 else tl.float32).to(tl.float32)
            if GROUP > 0:
                part *= tl.load(scale_row + group).to(tl.float32)[:, None]
            if X_GROUP > 0:
                part *= tl.load(x_scale_row + tl.minimum(begin // X_GROUP, X_SCALES - 1))[None, :]
            return acc + part
        else:
            return tl.dot(w, h, acc, out_dtype=acc.dtype)


@triton.jit
def quantized_gemm_kernel(x, x_scale, weight, scale, zero, bias, residual, out, num_rows, N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr,
                          BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr, MIDDLE: tl.constexpr,
                          X_GROUP: tl.constexpr, X_SCALES: tl.constexpr, INTEGER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_K: tl.constexpr, HEIGHT: tl.constexpr, SPLIT: tl.constexpr, ACT: tl.constexpr, THREADS: tl.constexpr,
                          PREFETCH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x is codes where there is `x_scale`. Programs that run together share weights and rows of x in L2: tiles are walked in groups of HEIGHT row tiles."""
    tiles_m = tl.num_programs(0)
    tiles_n = tl.num_programs(1)
    tile = tl.program_id(0) + tl.program_id(1) * tiles_m
    first = tile // (HEIGHT * tiles_n) * HEIGHT
    height = tl.minimum(tiles_m - first, HEIGHT)
    m = (first + tile % (HEIGHT * tiles_n) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % (HEIGHT * tiles_n) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    depth: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    inside = tl.minimum(n, N - 1).to(tl.int64)
    row = weight + inside * WORDS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch_rows(row + split * depth * WORDS // K, BLOCK_N, PREFETCH, THREADS)
            if ACT is not None:
                prefetch_rows(row + N * WORDS, BLOCK_N, PREFETCH, THREADS)
        tl.extra.cuda.gdc_wait()
    token = tl.minimum(m, num_rows - 1).to(tl.int64)
    x_row = x + token * K
    x_scale_row = None
    if x_scale is not None:
        x_scale_row = x_scale + token * X_SCALES
    scale_row = scale + inside // SCALE_ROWS * SCALES
    up_scale = scale + (inside + N) // SCALE_ROWS * SCALES
    zero_row = None
    up_zero = None
    if zero is not None:
        zero_row = zero + inside * SCALES
        up_zero = zero_row + N * SCALES
    valid = (m < num_rows)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if INTEGER else tl.float32)
    up = acc
    for step in range(0, depth, BLOCK_K):
        begin = split * depth + step
        acc = tile_product(row, scale_row, zero_row, x_row, x_scale_row, begin, valid, K, WORDS, BITS, GROUP, SCALES, MIDDLE, X_GROUP, X_SCALES,
                           BLOCK_N, BLOCK_M, BLOCK_K, acc)  # fmt: skip
        if ACT is not None:
            up = tile_product(row + N * WORDS, up_scale, up_zero, x_row, x_scale_row, begin, valid, K, WORDS, BITS, GROUP, SCALES, MIDDLE, X_GROUP,
                              X_SCALES, BLOCK_N, BLOCK_M, BLOCK_K, up)  # fmt: skip
    h = acc.to(tl.float32)
    u = up.to(tl.float32)
    if GROUP == 0:
        h *= tl.load(scale + inside).to(tl.float32)[:, None]
        if ACT is not None:
            u *= tl.load(scale + N + inside).to(tl.float32)[:, None]
    if x_scale is not None and X_GROUP == 0:
        s = tl.load(x_scale_row)[None, :]
        h *= s
        u *= s
    if ACT is not None:
        h = activate(h, ACT) * u
    if bias is not None:
        h += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    mask = valid & (n < N)[:, None]
    if residual is not None:
        h += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if SPLIT > 1:
        out += split * num_rows.to(tl.int64) * N
    tl.store(out + at, h.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(weight, scale, zero, out, N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                      SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr, MIDDLE: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program makes 128 columns of BLOCK_N rows of the weight [N, K]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    row = tl.minimum(n, N - 1).to(tl.int64)
    begin = tl.program_id(1) * 128
    k = begin + tl.arange(0, 128)[None, :]
    inside = k < K
    if BITS == 4:
        word = begin // 8 + (k - begin) % 16
        codes = (tl.load(weight + row * WORDS + word) >> ((k - begin) // 16 * 4)) & 15
    else:
        codes = tl.load(weight + row * WORDS + k, mask=inside, other=0.0)
    h = codes.to(tl.float32)
    group = tl.minimum(k // GROUP, SCALES - 1) if GROUP > 0 else k * 0
    if zero is not None:
        away = tl.load(zero + row * SCALES + group).to(tl.float32)
        h += (0.0 if BITS == 4 else MIDDLE) - away
    elif BITS == 4:
        h -= MIDDLE
    h *= tl.load(scale + row // SCALE_ROWS * SCALES + group).to(tl.float32)
    tl.store(out + row * K + k, h.to(out.dtype.element_ty), mask=inside & (n < N))


@dataclass(frozen=True)
class Tile:
    """Of a GEMM: rows of the weight, rows of x, columns; warps, pipeline stages, splits of K."""

    n: int
    m: int
    k: int
    warps: int
    stages: int
    split: int = 1

    def __str__(self) -> str:
        return f"n{self.n}_m{self.m}_k{self.k}_w{self.warps}_s{self.stages}" + (f"_split{self.split}" if self.split > 1 else "")


# best first; measured by benchmarks/gpu_quantized.py
GEMV_TILES = ((4, 4096, 8), (4, 2048, 4), (8, 2048, 8), (2, 4096, 4))  # rows of the weight, columns, warps
FEW_ROWS = (Tile(64, 16, 256, 4, 4), Tile(64, 16, 128, 4, 6), Tile(128, 16, 128, 4, 5), Tile(32, 16, 256, 4, 4))
SOME_ROWS = (Tile(64, 64, 128, 4, 5), Tile(128, 64, 128, 4, 4), Tile(64, 32, 128, 4, 5), Tile(64, 64, 256, 4, 3))
MANY_ROWS = (Tile(128, 128, 128, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 64, 128, 4, 4), Tile(64, 128, 128, 4, 3))


@dataclass(frozen=True)
class _Weights:
    """What kernels ask of a format's packed parts. group: columns that share a scale, 0: all of a row; rows: rows that share one."""

    bits: int
    group: int
    rows: int
    middle: float
    zero: bool

    @classmethod
    def of(cls, name: str) -> _Weights | None:
        match formats.get(name):
            case Fp8(block=block):
                return cls(8, BLOCK if block else 0, BLOCK if block else 1, 0.0, False)
            case Integer(bits=bits, group=group, zero=zero, middle=middle):
                return cls(bits, max(group, 0), 1, float(middle), zero)
        return None


def _rounding(activation: str, weight: torch.dtype) -> tuple[torch.dtype | None, int] | None:
    """(dtype of the codes of x, columns that share a scale, 0: all) of an activation's rounding; None where no kernel multiplies it by such a weight."""
    if activation == "none":
        return None, 0
    kind, _, shared = activation.rpartition("_")
    return (weight, int(shared.removeprefix("group")) if shared.startswith("group") else 0) if ROUNDINGS.get(weight) == kind else None


@claims("quantized_linear", "triton")
def quantized_linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    x, weights, rounding = args["x"], _Weights.of(args["format"]), _rounding(args["activation"], args["weight"].dtype)
    rounded = rounding is not None and rounding[0] is not None
    if weights is None or rounding is None or not supported(call, target) or len(x.shape) != 2 or x.dtype not in FLOATS[:2]:
        return []
    if rounded and (weights.zero or (rounding[1] and weights.group and rounding[1] != weights.group)):
        return []
    tokens, k = x.shape
    rows, width = most(tokens, steps), args["n"] // 2 if args["act"] else args["n"]
    scales = args["scale"].shape[1] if len(args["scale"].shape) == 2 else 1
    constants: dict[str, Any] = {
        "N": width, "K": k, "WORDS": -(-k // PLANES) * 16 if weights.bits == 4 else k, "BITS": weights.bits, "GROUP": weights.group, "SCALES": scales,
        "SCALE_ROWS": weights.rows, "MIDDLE": weights.middle, "X_GROUP": rounding[1], "ACT": args["act"],
    }  # fmt: skip
    if width % weights.rows and args["act"]:
        return []
    found = []
    if rows == 1:
        found += _gemvs(call, constants, rounding[0])
    if args["eps"] is not None and (not rounded or rounding[1]):
        return found + _behind_norm(call, steps, target, 1.0 if rows == 1 else 0.0)
    for i, tile in enumerate(_tiles(call, steps, target, rows, weights, rounding, width)):
        one = _gemm(call, constants, tile, rounding[0], rounding[1])
        found.append(replace(one, rank=(1.0 if rows == 1 else 0.0) + i / 10))
    if not rounded and rows > 64:
        found += _dequantized(call, constants, steps, target)
    if rounded and rounding[0] == torch.float8_e4m3fn and not weights.group and not rounding[1] and rows > 16:
        found += _library(call, steps, target)
    return found


def _behind_norm(call: Call, steps: Steps, target: Target, rank: float) -> list[Candidate]:
    """A norm of its own, then every way to multiply."""
    x = call.args["x"]
    norm = Call("rms_norm", {"x": x, "weight": call.args["norm_weight"], "eps": call.args["eps"], "offset": call.args["offset"]}, (x,))
    plain = Call(call.op, call.args | {"norm_weight": None, "eps": None}, call.results)
    tails = [c for c in claimants(plain, steps, target) if not c.name.startswith("gemv")]
    heads = claimants(norm, steps, target)[:1]
    return [replace(chain(head, x, "x", tail, {"weight": "norm_weight"}), rank=rank + tail.rank) for head in heads for tail in tails]


def _gemvs(call: Call, constants: dict[str, Any], dtype: torch.dtype | None) -> list[Candidate]:
    found = []
    operands = {n: Operand(arg=n) for n in ("x", "norm_weight", "input_scale", "weight", "scale", "zero", "bias", "residual")} | {"out": Operand(out=0)}
    width, k, glu = constants["N"], constants["K"], constants["ACT"] is not None
    itemsize = 4 if constants["BITS"] == 4 else 1
    functions = [quantized_gemv_kernel, row_product, columns_of, rounded_row, nibble, row_scale, to_eight_bits, prefetch_rows, activate, tanh]
    for rank, (block_n, block_k, warps) in enumerate(GEMV_TILES):
        block_n, block_k = max(1, block_n // (2 if glu else 1)), max(PLANES, min(block_k, power_of_two(k)))
        if constants["BITS"] == 4:
            block_k = max(PLANES, block_k)
            block_n *= 2
        row_bytes = constants["WORDS"] * itemsize
        blocks = constants | {
            "EPS": call.args["eps"], "OFFSET": call.args["offset"], "BLOCK_N": block_n, "BLOCK_K": block_k,
            "ROUND": ROUNDINGS.get(dtype), "LARGEST": LARGEST.get(dtype),  # type: ignore[call-overload, arg-type]
            "THREADS": 32 * warps, "PREFETCH": min(row_bytes, 4096) if row_bytes % 16 == 0 else 0,
        }  # fmt: skip
        one = launch(call, functions, operands, blocks, ((width, block_n),), num_warps=warps)
        found.append(Candidate(f"gemv_n{block_n}_k{block_k}_w{warps}", (one,), rank=rank / 10))
    return list({c.name: c for c in found}.values())


def _tiles(call: Call, steps: Steps, target: Target, rows: int, weights: _Weights, rounding: tuple[torch.dtype | None, int], width: int) -> list[Tile]:
    """Tiles that fit in shared memory, best first."""
    k, pieces = call.args["x"].shape[1], 2 if call.args["act"] else 1
    group = rounding[1] or weights.group
    x_bytes = 1 if rounding[0] is not None else 2
    tiles = []
    for t in FEW_ROWS if rows <= 16 else SOME_ROWS if rows <= 64 else MANY_ROWS:
        depth = PLANES if weights.bits == 4 else group or max(32, min(t.k, power_of_two(k)))
        n = max(t.n // pieces, 32) if t.m >= 128 else t.n
        tile_bytes = depth * (pieces * n * weights.bits // 8 + t.m * x_bytes)
        stages = min(t.stages * max(1, t.k // depth), SHARED_MEMORY_BYTES[target.isa] // tile_bytes, 8)
        if stages >= 2:
            tiles.append(replace(t, n=min(n, max(32, power_of_two(width))), k=depth, stages=stages))
    tiles = list(dict.fromkeys(tiles))
    if pieces == 2 or rows > 64:
        return tiles
    apart = []
    for t in tiles[:2]:
        programs = -(-rows // t.m) * -(-width // t.n)
        split = max((s for s in (2, 4, 8) if programs * s <= 3 * PROGRAMS and k >= 2 * s * t.k), default=1)
        apart += [replace(t, split=split)] if split > 1 else []
    return apart + tiles if -(-width // tiles[0].n) <= PROGRAMS else tiles + apart


def _rounded(call: Call, dtype: torch.dtype, group: int) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The launch that rounds x, to scratch 0 and 1: codes and scales."""
    x = call.args["x"]
    tokens, k = x.shape
    block_k = power_of_two(group or k)
    block_m = max(1, min(16, 4096 // block_k))
    scratch = (Tensor(dtype, (tokens, k)), Tensor(torch.float32, (tokens, -(-k // group) if group else 1)))
    operands = {n: Operand(arg=n) for n in ("x", "norm_weight", "input_scale")}
    operands |= {"codes": Operand(scratch=0), "scales": Operand(scratch=1), "num_rows": Operand(size=tokens)}
    constants = {"K": k, "GROUP": group or k, "LARGEST": LARGEST[dtype], "EPS": call.args["eps"], "OFFSET": call.args["offset"], "BLOCK_M": block_m,
                 "BLOCK_K": block_k}  # fmt: skip
    grid = ((tokens, block_m), (k, group or k))
    return launch(
        call, [quantize_rows_kernel, row_scale, to_eight_bits], operands, constants, grid, scratch=scratch, num_warps=8 if block_k > 2048 else 4
    ), scratch


def _gemm(call: Call, constants: dict[str, Any], t: Tile, dtype: torch.dtype | None, group: int) -> Candidate:
    tokens, k = call.args["x"].shape
    width, bits = constants["N"], constants["BITS"]
    launches: list[Launch] = []
    scratch: tuple[Tensor, ...] = ()
    x = {"x": Operand(arg="x")}
    x_scales = 1
    if dtype is not None:
        first, scratch = _rounded(call, dtype, group)
        launches.append(first)
        x = {"x": Operand(scratch=0), "x_scale": Operand(scratch=1)}
        x_scales = scratch[1].shape[1]  # type: ignore[assignment]
    inputs = x | {n: Operand(arg=n) for n in ("weight", "scale", "zero")}
    addends = {n: Operand(arg=n) for n in ("bias", "residual")}
    num_rows = {"num_rows": Operand(size=tokens)}
    row_bytes = k // t.split * bits // 8
    blocks = constants | {
        "X_SCALES": x_scales, "INTEGER": dtype == torch.int8 and not (group or constants["GROUP"]), "BLOCK_N": t.n, "BLOCK_M": t.m, "BLOCK_K": t.k, "HEIGHT": 8,
        "SPLIT": t.split, "THREADS": 32 * t.warps, "PREFETCH": min(row_bytes, (16 << 10) // t.n) if k % (PLANES * t.split) == 0 and t.m <= 64 else 0,
    } | ({} if dtype is not None else {"x_scale": None})  # fmt: skip
    functions = [quantized_gemm_kernel, tile_product, nibbles, prefetch_rows, activate, tanh]
    grid = ((tokens, t.m), (width, t.n))
    if t.split == 1:
        launches.append(launch(call, functions, inputs | addends | {"out": Operand(out=0)} | num_rows, blocks, grid, scratch=scratch,
                               num_warps=t.warps, num_stages=t.stages))  # fmt: skip
        return Candidate(f"gemm_{t}", tuple(launches), scratch)
    partial = Operand(scratch=len(scratch))
    scratch = (*scratch, Tensor(torch.float32, (product(tokens, t.split), width)))
    launches.append(launch(call, functions, inputs | {"out": partial} | num_rows, blocks | {"bias": None, "residual": None}, (*grid, (t.split, 1)),
                           scratch=scratch, num_warps=t.warps, num_stages=t.stages))  # fmt: skip
    launches.append(launch(call, [sum_splits_kernel], {"partial": partial} | addends | {"out": Operand(out=0)} | num_rows,
                           {"N": width, "SPLIT": t.split, "BLOCK": 256}, ((tokens, 1), (width, 256)), scratch=scratch))  # fmt: skip
    return Candidate(f"gemm_{t}", tuple(launches), scratch)


def _dequantized(call: Call, constants: dict[str, Any], steps: Steps, target: Target) -> list[Candidate]:
    """The weight in the type of x, made anew in each step, then the library's product: what it costs is little beside a product with many rows."""
    args = call.args
    x, n, k = args["x"], args["n"], constants["K"]
    if n * k * x.dtype.itemsize > LARGEST_SCRATCH or (args["act"] and args["bias"] is not None):
        return []
    plain = Tensor(x.dtype, (n, k))
    names = ("WORDS", "BITS", "GROUP", "SCALES", "SCALE_ROWS", "MIDDLE")
    blocks = {"N": n, "K": k, "BLOCK_N": 32, **{c: constants[c] for c in names}}
    operands = {p: Operand(arg=p) for p in ("weight", "scale", "zero")} | {"out": Operand(out=0)}
    made = Call("dequantize", args, (plain,))
    head = Candidate("dequantize", (launch(made, [dequantize_kernel], operands, blocks, ((n, 32), (k, 128))),))
    rest = {"act": args["act"]} if args["act"] else {"bias": args["bias"]} | ({"residual": args["residual"]} if args["residual"] is not None else {})
    op = "linear_glu" if args["act"] else "linear" if args["residual"] is None else "linear_add"
    tails = [c for c in claimants(Call(op, {"x": x, "weight": plain, **rest}, call.results), steps, target) if c.name.startswith("library")]
    return [replace(chain(head, plain, "weight", tail), rank=0.05 if steps.max_tokens <= 512 else -1.0) for tail in tails]


def _library(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """cuBLASLt's product of codes with a scale for each row of both; what follows it is a kernel of its own."""
    args = call.args
    tokens, k = args["x"].shape
    if k % 16 or args["n"] % 16 or args["x"].dtype != torch.bfloat16:
        return []
    first, scratch = _rounded(call, torch.float8_e4m3fn, 0)
    codes, operands = (Operand(scratch=0), Operand(scratch=1)), (Operand(arg="weight"), Operand(arg="scale"))

    def multiply(out: Operand) -> Launch:
        return Launch(Source("library", "torch", "scaled_mm", ""), (out, *codes, *operands))

    rank = 0.5 if steps.max_tokens <= 64 else -1.0
    if not args["act"]:
        adds = [Launch(Source("library", "torch", "add", ""), (Operand(out=0), Operand(arg=n))) for n in ("bias", "residual") if args[n] is not None]
        return [Candidate("library", (first, multiply(Operand(out=0)), *adds), scratch, rank)]
    if args["bias"] is not None:
        return []
    gate_up = Tensor(args["x"].dtype, (tokens, args["n"]))
    inner = Call("glu", {"gate_up": gate_up, "act": args["act"]}, call.results)
    head = Candidate("library", (first, multiply(Operand(out=0))), scratch)
    return [replace(chain(head, gate_up, "gate_up", glu), rank=rank) for glu in claimants(inner, steps, target)[:1]]
