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
