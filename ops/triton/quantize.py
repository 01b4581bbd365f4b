"""Rows to eight bits, in registers: the jitted side of `ops.quantize`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_scale(h, LARGEST: tl.constexpr):
    """The scale of each row of h [M, N], elements that are not there being 0 → [M, 1]."""
    return (tl.max(tl.abs(h), 1) / LARGEST)[:, None]


@triton.jit
def to_eight_bits(h, scale, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """h / scale in `dtype`, to nearest even, saturating; 0 where the scale is 0."""
    h *= tl.where(scale > 0.0, 1.0 / scale, 0.0)
    h = tl.minimum(tl.maximum(h, -LARGEST), LARGEST)
    if dtype == tl.int8:
        h = (h + 12582912.0) - 12582912.0  # 1.5 · 2²³: its last bit is 1
    return h.to(dtype)


@triton.jit
def byte(words, B: tl.constexpr, dtype: tl.constexpr):
    """Byte B of each word, an eight-bit number, in float16."""
    return (words >> (8 * B)).to(tl.int8).to(dtype, bitcast=True).to(tl.float16)


@triton.jit
def rows_of_words(cache, row, there, WIDTH: tl.constexpr):
    """Rows of WIDTH eight-bit numbers in float16 [rows, WIDTH]. Read in words, because a product that sums over rows would fetch single bytes."""
    col = tl.arange(0, WIDTH // 4)
    words = tl.load(cache.to(tl.pointer_type(tl.int32)) + row[:, None] * (WIDTH // 4) + col[None, :], mask=there[:, None], other=0)
    dtype: tl.constexpr = cache.dtype.element_ty
    low = tl.join(byte(words, 0, dtype), byte(words, 1, dtype))
    high = tl.join(byte(words, 2, dtype), byte(words, 3, dtype))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), [row.shape[0], WIDTH])
