"""A product of one row with quantized weights: every program normalizes and rounds the row for itself, in the shadow of its weights.

A norm's factor multiplies the result, or the scale of codes. 4-bit codes are put into the mantissa of 16, and 16 and the zero point are taken from
the sum of a group: 16 Σ x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..kernel import Candidate, Operand
from ..quantize import LARGEST
from .activations import activate, tanh
from .prefetch import prefetch_rows
from .product_tile import add_and_store
from .quantize import row_scale
from .quantized_product import CHUNK, KINDS, Product, begin_of, word_of
from .source import launch, power_of_two

SIXTEEN = 0x41800000
"""The bits of 16 in float32. Kernels get them at run time: see `dequantize.MAGIC`."""
TILES = ((8, 4096, 8), (16, 4096, 8), (16, 4096, 4), (8, 4096, 4), (8, 2048, 4))
"""Rows of the weight, columns, warps: best first. More rows share what it costs to make the row of x ready, fewer make more programs."""

AHEAD = 96 << 10
"""Bytes of the weight that a program asks for behind its first blocks: as many programs as are there at once ask for half of L2."""


@triton.jit
def nibble(words, sixteen, Q: tl.constexpr):
    """16 + nibble Q of each word, in float32: the nibble becomes the first bits of the mantissa of SIXTEEN, whose bits are `sixteen`."""
    placed = words << (19 - 4 * Q) if Q < 5 else words >> (4 * Q - 19)
    return ((placed & 0x00780000) | sixteen).to(tl.float32, bitcast=True)


@triton.jit
def as_codes(h, scale, ROUND: tl.constexpr):
    """h in units of `scale`, in float32, as eight bits say it. What is beyond their range is there by `scale` alone, which the conversion saturates."""
    h *= tl.where(scale > 0.0, 1.0 / scale, 0.0)
    if ROUND == "int8":
        return (h + 12582912.0) - 12582912.0  # 1.5 · 2²³: its last bit is 1
    else:
        return h.to(tl.float8e4nv).to(tl.float32)


@triton.jit
def rounded_row(h, by, ROUND: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr):
    """A row [K] as eight bits say it: in units of `by`, or, with groups of their own scales, dequantized."""
    if GROUP > 0:
        groups = tl.reshape(h, [h.shape[0] // GROUP, GROUP])
        each = row_scale(groups, LARGEST)
        return tl.reshape(as_codes(groups, each, ROUND) * each, h.shape)
    else:
        return as_codes(h, by, ROUND)


@triton.jit
def columns_of(x, norm_weight, begin, BLOCK_K: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr):
    """BLOCK_K columns of the row x, times the norm's weight if there is one. In one dimension, so that it is they, and not the weights,
    that are brought into the other's layout."""
    k = begin + tl.arange(0, BLOCK_K)
    h = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if norm_weight is not None:
        h *= tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32) + OFFSET
    return h


@triton.jit
def codes_of(row, begin, WORDS: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr, PANEL: tl.constexpr):
    """Columns `begin` … of the weight's rows at pointers row [N, 1], packed."""
    j = begin // (8 if BITS == 4 else 1) + tl.arange(0, BLOCK_K // (8 if BITS == 4 else 1))[None, :]
    return tl.load(row + (word_of(begin, BLOCK_K // 8, PANEL)[None, :] if BITS == 4 else j), mask=j < WORDS, other=0.0)


@triton.jit
def product_of_words(words, sixteen, scale_row, zero_row, x, norm_weight, begin, K: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                     MIDDLE: tl.constexpr, OFFSET: tl.constexpr, PANEL: tl.constexpr):  # fmt: skip
    """Products [N, …] of words [N, 16 · CHUNKS] (layout "panels" of `formats.integer`) with x, to be added up.

    Of the words of a thread, those that share a scale are added before it multiplies them.
    """
    N: tl.constexpr = words.shape[0]
    CHUNKS: tl.constexpr = words.shape[1] // 16
    RUNS: tl.constexpr = max(128 // GROUP, 1) if GROUP > 0 else 1
    h = columns_of(x, norm_weight, begin, CHUNKS * 128, K, OFFSET)
    # chunk, j, bits of q, t, h → a word's columns behind its place: h, bits of q
    h = tl.permute(tl.reshape(h, [CHUNKS, 4, 2, 2, 4, 2]), (0, 4, 1, 5, 2, 3))
    low, high = tl.split(tl.permute(tl.reshape(h, [1, CHUNKS * 16, 2, 4]), (0, 1, 3, 2)))
    part = tl.zeros(words.shape, tl.float32)
    total = tl.zeros([1, CHUNKS * 16], tl.float32)
    for half in tl.static_range(2):
        even, odd = tl.split(tl.reshape(low if half == 0 else high, [1, CHUNKS * 16, 2, 2]))
        h0, h2 = tl.split(even)
        h1, h3 = tl.split(odd)
        total += (h0 + h1) + (h2 + h3)
        part += nibble(words, sixteen, half * 4) * h0
        part += nibble(words, sixteen, half * 4 + 1) * h1
        part += nibble(words, sixteen, half * 4 + 2) * h2
        part += nibble(words, sixteen, half * 4 + 3) * h3
    part = tl.sum(tl.reshape(part, [N, CHUNKS, 4, RUNS, 4 // RUNS]), 4)
    total = tl.sum(tl.reshape(total, [1, CHUNKS, 4, RUNS, 4 // RUNS]), 4)
    if GROUP > 0:
        columns = begin + tl.arange(0, CHUNKS)[:, None] * 128 + tl.arange(0, RUNS)[None, :] * (128 // RUNS)
        run = tl.reshape(tl.minimum(columns // GROUP, SCALES - 1) * PANEL, [1, CHUNKS, 1, RUNS])
    else:
        run = tl.zeros([1, 1, 1, 1], tl.int32)
    away = 16.0 + MIDDLE
    if zero_row is not None:
        away = 16.0 + tl.load(tl.reshape(zero_row, [N, 1, 1, 1]) + run).to(tl.float32)
    part -= away * total
    if GROUP > 0:
        part *= tl.load(tl.reshape(scale_row, [N, 1, 1, 1]) + run).to(tl.float32)
    return tl.reshape(part, [N, CHUNKS * 4 * RUNS])


@triton.jit
def product_of_bytes(codes, scale_row, zero_row, x, norm_weight, begin, by, K: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, MIDDLE: tl.constexpr,
                     ROUND: tl.constexpr, X_GROUP: tl.constexpr, LARGEST: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """Products [N, BLOCK_K / 16] of codes of eight bits with x, to be added up: what a thread has of a row in one load is added first."""
    N: tl.constexpr = codes.shape[0]
    RUNS: tl.constexpr = codes.shape[1] // 16
    h = columns_of(x, norm_weight, begin, RUNS * 16, K, OFFSET)
    if ROUND is not None:
        h = rounded_row(h, by, ROUND, X_GROUP, LARGEST)
    part = tl.sum(tl.reshape(codes.to(tl.float32) * h[None, :], [N, RUNS, 16]), 2)
    run = tl.minimum((begin + tl.arange(0, RUNS)[None, :] * 16) // GROUP, SCALES - 1) if GROUP > 0 else tl.zeros([1, 1], tl.int32)
    if zero_row is not None:
        part += (MIDDLE - tl.load(zero_row + run).to(tl.float32)) * tl.sum(tl.reshape(h, [1, RUNS, 16]), 2)
    if GROUP > 0:
        part *= tl.load(scale_row + run).to(tl.float32)
    return part


@triton.jit
def product_of(codes, sixteen, scale_row, zero_row, x, norm_weight, begin, by, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
               SCALES: tl.constexpr, MIDDLE: tl.constexpr, ROUND: tl.constexpr, X_GROUP: tl.constexpr, LARGEST: tl.constexpr,
               OFFSET: tl.constexpr, PANEL: tl.constexpr):  # fmt: skip
    if BITS == 4:
        return product_of_words(codes, sixteen, scale_row, zero_row, x, norm_weight, begin, K, GROUP, SCALES, MIDDLE, OFFSET, PANEL)
    else:
        return product_of_bytes(codes, scale_row, zero_row, x, norm_weight, begin, by, K, GROUP, SCALES, MIDDLE, ROUND, X_GROUP, LARGEST, OFFSET)


@triton.jit
def quantized_gemv_kernel(x, norm_weight, input_scale, weight, scale, zero, bias, residual, out, sixteen, N: tl.constexpr, K: tl.constexpr,
                          WORDS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr, MIDDLE: tl.constexpr,
                          ROUND: tl.constexpr, X_GROUP: tl.constexpr, LARGEST: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
                          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACT: tl.constexpr, PANEL: tl.constexpr, THREADS: tl.constexpr,
                          PREFETCH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A row of the weight has WORDS elements of memory and SCALES scales; SCALE_ROWS rows share them. PREFETCH: bytes of it behind its first block."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(n, N - 1).to(tl.int64)
    row = (weight + begin_of(inside, WORDS, 16, PANEL))[:, None]
    # the first block of the weight is on its way before x is there
    w = codes_of(row, 0, WORDS, BITS, BLOCK_K, PANEL)
    v = w
    if ACT is not None:
        v = codes_of(row + N * WORDS, 0, WORDS, BITS, BLOCK_K, PANEL)
    if GROUP == 0:  # and what is needed at the end
        own_scale = tl.load(scale + inside)
        if ACT is not None:
            other_scale = tl.load(scale + N + inside)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            PANELS: tl.constexpr = max(BLOCK_N // PANEL, 1)  # programs with fewer rows ask for what their neighbours need too
            panels = tl.minimum(tl.program_id(0) * BLOCK_N // PANEL * PANEL + tl.arange(0, PANELS) * PANEL, N - PANEL).to(tl.int64)
            rest = weight + panels * WORDS + BLOCK_K // (8 if BITS == 4 else 1) * PANEL
            prefetch_rows(rest, PANELS, PREFETCH * PANEL, THREADS)
            if ACT is not None:
                prefetch_rows(rest + N * WORDS, PANELS, PREFETCH * PANEL, THREADS)
        tl.extra.cuda.gdc_wait()
    if residual is not None:
        added = tl.load(residual + n, mask=n < N, other=0.0)
    by = 0.0
    factor = 1.0
    if EPS is not None or (ROUND is not None and X_GROUP == 0 and input_scale is None):
        biggest = tl.zeros([BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_K], tl.float32)
        for begin in tl.static_range(0, K, BLOCK_K):
            if EPS is not None:
                h = columns_of(x, None, begin, BLOCK_K, K, OFFSET)
                squares += h * h
            if ROUND is not None:
                biggest = tl.maximum(biggest, tl.abs(columns_of(x, norm_weight, begin, BLOCK_K, K, OFFSET)))
        if EPS is not None:
            factor = tl.rsqrt(tl.sum(squares, 0) / K + EPS)
        by = tl.max(biggest, 0) / LARGEST if ROUND is not None else 0.0  # of x before it is normalized, as are the codes
    if input_scale is not None:
        by = tl.load(input_scale) / factor
    scale_row = (scale + begin_of(inside // SCALE_ROWS, SCALES, 1, PANEL))[:, None]
    up_scale = (scale + begin_of((inside + N) // SCALE_ROWS, SCALES, 1, PANEL))[:, None]
    zero_row = None
    up_zero = None
    if zero is not None:
        zero_row = (zero + begin_of(inside, SCALES, 1, PANEL))[:, None]
        up_zero = zero_row + N * SCALES
    acc = product_of(w, sixteen, scale_row, zero_row, x, norm_weight, 0, by, K, BITS, GROUP, SCALES, MIDDLE, ROUND, X_GROUP, LARGEST, OFFSET, PANEL)
    if ACT is not None:
        up = product_of(v, sixteen, up_scale, up_zero, x, norm_weight, 0, by, K, BITS, GROUP, SCALES, MIDDLE, ROUND, X_GROUP, LARGEST, OFFSET, PANEL)
    for begin in tl.range(BLOCK_K, K, BLOCK_K, num_stages=1):
        w = codes_of(row, begin, WORDS, BITS, BLOCK_K, PANEL)
        if ACT is not None:
            v = codes_of(row + N * WORDS, begin, WORDS, BITS, BLOCK_K, PANEL)
        acc += product_of(w, sixteen, scale_row, zero_row, x, norm_weight, begin, by, K, BITS, GROUP, SCALES, MIDDLE, ROUND, X_GROUP, LARGEST, OFFSET, PANEL)
        if ACT is not None:
            up += product_of(v, sixteen, up_scale, up_zero, x, norm_weight, begin, by, K, BITS, GROUP, SCALES, MIDDLE, ROUND, X_GROUP, LARGEST, OFFSET, PANEL)
    h = tl.sum(acc, 1)
    if ACT is not None:
        u = tl.sum(up, 1)
    if GROUP == 0:
        h *= own_scale.to(tl.float32)
        if ACT is not None:
            u *= other_scale.to(tl.float32)
    if ROUND is not None and X_GROUP == 0:
        factor *= by
    h *= factor
    if ACT is not None:
        h = activate(h, ACT) * (u * factor)
    if residual is not None:
        h += added.to(tl.float32)
    add_and_store(h, bias, None, out, n, n, n < N, N)


def gemvs(product: Product) -> list[Candidate]:
    call, weights, k, row_bytes = product.call, product.weights, product.k, product.weights.words(product.k) * (4 if product.weights.bits == 4 else 1)
    operands = {n: Operand(arg=n) for n in ("x", "norm_weight", "input_scale", "weight", "scale", "zero", "bias", "residual")} | {"out": Operand(out=0)}
    functions = [quantized_gemv_kernel, product_of, product_of_words, product_of_bytes, codes_of, begin_of, word_of, columns_of, rounded_row, as_codes,
                 nibble, row_scale, prefetch_rows, add_and_store, activate, tanh]  # fmt: skip
    sixteen = {"sixteen": Operand(const=SIXTEEN)} if weights.bits == 4 else {}
    absent = {} if sixteen else {"sixteen": None}
    found = []
    for rank, (block_n, block_k, warps) in enumerate(TILES):
        block_n = block_n // 2 if product.act else block_n
        block_k = max(CHUNK, min(block_k, power_of_two(k)))
        rest = max(row_bytes - block_k * weights.bits // 8, 0)
        blocks = product.constants() | {
            "EPS": call.args["eps"], "OFFSET": call.args["offset"], "BLOCK_N": block_n, "BLOCK_K": block_k,
            "ROUND": KINDS.get(product.codes), "LARGEST": LARGEST.get(product.codes), "THREADS": 32 * warps,
            "PREFETCH": min(rest, AHEAD // (block_n * (2 if product.act else 1))) if rest % 16 == 0 and row_bytes % 16 == 0 else 0,
        }  # fmt: skip
        one = launch(call, functions, operands | sixteen, absent | blocks, ((product.width, block_n),), num_warps=warps)
        found.append(Candidate(f"gemv_n{block_n}_k{block_k}_w{warps}", (one,), rank=rank / 10))
    return list({c.name: c for c in found}.values())
