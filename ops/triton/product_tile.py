"""Which tile of a product a program makes, and what becomes of it."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, tanh
from .tickets import is_last


@triton.jit
def tile_at(BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, HEIGHT: tl.constexpr):
    """(first row of the weight, first row of x) of this program's tile, in a grid of (row tiles, column tiles).

    Programs that run together share weights and rows of x in L2: tiles are walked in groups of HEIGHT row tiles.
    """
    tiles_m = tl.num_programs(0)
    tiles_n = tl.num_programs(1)
    tile = tl.program_id(0) + tl.program_id(1) * tiles_m
    first = tile // (HEIGHT * tiles_n) * HEIGHT
    height = tl.minimum(tiles_m - first, HEIGHT)
    return tile % (HEIGHT * tiles_n) // height * BLOCK_N, (first + tile % (HEIGHT * tiles_n) % height) * BLOCK_M


@triton.jit
def early_sum(residual, m, n, num_rows, N: tl.constexpr):
    """The residual of rows m and columns n (one of them along each axis) for the first of the programs that share a tile; the others have zeros.

    Asked for before the product, where a tile has registers for it, so that nobody waits for it at the end.
    """
    mask = (m < num_rows) & (n < N) & (tl.program_id(2) == 0)
    return tl.load(residual + m.to(tl.int64) * N + n, mask=mask, other=0.0)


@triton.jit
def add_and_store(h, bias, residual, out, at, n, mask, N: tl.constexpr):
    if bias is not None:
        h += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, h.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_of_parts(partial, apart, mask, SPLIT: tl.constexpr):
    """Of SPLIT, each `apart` from the one before, in their order."""
    h = tl.load(partial, mask=mask, other=0.0, cache_modifier=".cg")
    for other in tl.static_range(1, SPLIT):
        h += tl.load(partial + other * apart, mask=mask, other=0.0, cache_modifier=".cg")
    return h


@triton.jit
def finish_tile(h, u, bias, residual, out, partial, tickets, m, n, num_rows, N: tl.constexpr, SPLIT: tl.constexpr, ACT: tl.constexpr):
    """h, float32, of rows m and columns n (one of them along each axis), gated with u if there is ACT, with what is added → out [num_rows, N].

    With SPLIT > 1 h and u are parts of sums, of as many programs along the grid's third axis: they go to `partial` [SPLIT, 1, num_rows, N] ([SPLIT, 2, …]
    with ACT), and the last program of a tile adds the parts up.
    """
    at = m.to(tl.int64) * N + n
    mask = (m < num_rows) & (n < N)
    if SPLIT > 1:
        apart = num_rows.to(tl.int64) * N
        SUMS: tl.constexpr = 1 if ACT is None else 2
        tl.store(partial + tl.program_id(2) * SUMS * apart + at, h, mask=mask)
        if ACT is not None:
            tl.store(partial + (tl.program_id(2) * SUMS + 1) * apart + at, u, mask=mask)
        if is_last(tickets + tl.program_id(0) + tl.program_id(1) * tl.num_programs(0), SPLIT):
            h = sum_of_parts(partial + at, SUMS * apart, mask, SPLIT)
            if ACT is not None:
                h = activate(h, ACT) * sum_of_parts(partial + apart + at, SUMS * apart, mask, SPLIT)
            add_and_store(h, bias, residual, out, at, n, mask, N)
    else:
        if ACT is not None:
            h = activate(h, ACT) * u
        add_and_store(h, bias, residual, out, at, n, mask, N)


FINISH_TILE = (finish_tile, sum_of_parts, add_and_store, is_last, activate, tanh)
"""What a kernel that ends in `finish_tile` calls there."""
