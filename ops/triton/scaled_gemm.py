"""Products of codes: weights and activations in eight bits meet on the matrix units, and scales multiply what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import triton
import triton.language as tl
from triton import JITFunction

from ..chain import chain
from ..kernel import Call, Candidate, Launch, Operand, Source, Tensor, claimants
from ..library import multiplies_codes
from .prefetch import prefetch_rows
from .product_tile import early_sum, finish_tile, tile_at
from .quantized_gemm import Tile, Tiles, gemm, tiles
from .quantized_product import Product
from .round_rows import rounded

TILES = Tiles(
    few=(Tile(64, 16, 256, 4, 4), Tile(64, 16, 128, 4, 6), Tile(128, 16, 256, 8, 4), Tile(64, 16, 256, 4, 3)),
    some=(Tile(64, 32, 256, 4, 4), Tile(64, 64, 256, 4, 4), Tile(64, 64, 128, 4, 5), Tile(128, 64, 128, 4, 4)),
    many=(Tile(64, 128, 256, 4, 4), Tile(128, 128, 128, 8, 4), Tile(128, 64, 256, 4, 4), Tile(64, 128, 128, 4, 4), Tile(128, 256, 128, 8, 4)),
    gated_some=(Tile(64, 64, 128, 4, 4), Tile(128, 64, 128, 4, 4), Tile(64, 32, 128, 4, 5), Tile(64, 64, 256, 4, 3)),
    gated_many=(Tile(128, 128, 128, 8, 4), Tile(64, 256, 128, 8, 4), Tile(64, 64, 128, 4, 4), Tile(64, 128, 128, 4, 3)),
)


@triton.jit
def multiply_codes(acc, w, h, s, x_s):
    """acc + w · h, of groups times their scales: s [N] of the weight, x_s [M] of x, or None."""
    if (s is None) & (x_s is None):
        return tl.dot(w, h, acc, out_dtype=acc.dtype)
    else:
        part = tl.dot(w, h, out_dtype=tl.int32 if w.dtype == tl.int8 else tl.float32).to(tl.float32)
        if s is not None:
            part *= s.to(tl.float32)[:, None]
        if x_s is not None:
            part *= x_s[None, :]
        return acc + part


@triton.jit
def scaled_gemm_kernel(x, x_scale, weight, scale, bias, residual, out, partial, tickets, num_rows, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                       SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr, X_GROUP: tl.constexpr, X_SCALES: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, HEIGHT: tl.constexpr, SPLIT: tl.constexpr, ACT: tl.constexpr, THREADS: tl.constexpr,
                       PREFETCH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A block of columns lies in one group of each side. Scales of a group are asked for while the group before is multiplied."""
    EVEN: tl.constexpr = K % (SPLIT * BLOCK_K) == 0
    first_n, first_m = tile_at(BLOCK_N, BLOCK_M, HEIGHT)
    n = first_n + tl.arange(0, BLOCK_N)
    m = first_m + tl.arange(0, BLOCK_M)
    inside = tl.minimum(n, N - 1).to(tl.int64)
    token = tl.minimum(m, num_rows - 1).to(tl.int64)
    depth: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    start = tl.program_id(2) * depth
    k = tl.arange(0, BLOCK_K)
    row = weight + inside * K
    scale_row = scale + inside // SCALE_ROWS * SCALES
    up_scale_row = scale + (inside + N) // SCALE_ROWS * SCALES
    # what is needed at the end is asked for at the beginning
    if GROUP == 0:
        by = tl.load(scale_row)
        if ACT is not None:
            up_by = tl.load(up_scale_row)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch_rows(row + start, BLOCK_N, PREFETCH, THREADS)
            if ACT is not None:
                prefetch_rows(row + N * K + start, BLOCK_N, PREFETCH, THREADS)
        tl.extra.cuda.gdc_wait()
    w_row = row[:, None] + k[None, :]
    x_row = x + token[None, :] * K + k[:, None]
    x_scale_row = x_scale + token * X_SCALES
    valid = (m < num_rows)[None, :]
    EARLY: tl.constexpr = residual is not None and ACT is None and BLOCK_N * BLOCK_M <= 16 * THREADS
    if EARLY:
        added = early_sum(residual, m[None, :], n[:, None], num_rows, N)
    if X_GROUP == 0:
        x_by = tl.load(x_scale_row)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if weight.dtype.element_ty == tl.int8 and GROUP + X_GROUP == 0 else tl.float32)
    up = acc
    s = None
    t = None
    x_s = None
    if GROUP > 0:
        group = tl.minimum(start // GROUP, SCALES - 1)  # splits of K may end in blocks without columns
        s = tl.load(scale_row + group)
        if ACT is not None:
            t = tl.load(up_scale_row + group)
    if X_GROUP > 0:
        x_s = tl.load(x_scale_row + tl.minimum(start // X_GROUP, X_SCALES - 1))
    for begin in range(start, start + depth, BLOCK_K):
        if EVEN:
            h = tl.load(x_row + begin, mask=valid, other=0.0)
            w = tl.load(w_row + begin)
        else:
            inner = begin + k < K
            h = tl.load(x_row + begin, mask=inner[:, None] & valid, other=0.0)
            w = tl.load(w_row + begin, mask=inner[None, :], other=0.0)
        acc = multiply_codes(acc, w, h, s, x_s)
        if ACT is not None:
            if EVEN:
                v = tl.load(w_row + N * K + begin)
            else:
                v = tl.load(w_row + N * K + begin, mask=inner[None, :], other=0.0)
            up = multiply_codes(up, v, h, t, x_s)
        if GROUP > 0:
            group = tl.minimum((begin + BLOCK_K) // GROUP, SCALES - 1)
            s = tl.load(scale_row + group)
            if ACT is not None:
                t = tl.load(up_scale_row + group)
        if X_GROUP > 0:
            x_s = tl.load(x_scale_row + tl.minimum((begin + BLOCK_K) // X_GROUP, X_SCALES - 1))
    h = acc.to(tl.float32)
    u = up.to(tl.float32)
    if GROUP == 0:
        h *= by.to(tl.float32)[:, None]
        if ACT is not None:
            u *= up_by.to(tl.float32)[:, None]
    if X_GROUP == 0:
        h *= x_by[None, :]
        u *= x_by[None, :]
    if EARLY:
        h += added.to(tl.float32)
    finish_tile(h, u, bias, None if EARLY else residual, out, partial, tickets, m[None, :], n[:, None], num_rows, N, SPLIT, ACT)


def scaled_gemms(product: Product, gate: str | None = None) -> list[Candidate]:
    """x is rounded in a launch of its own, which does what stands before the product too: a norm, or the unit `gate`."""
    return of_tiles(product, tiles(product, TILES), [scaled_gemm_kernel, multiply_codes], gate)


def of_tiles(product: Product, wanted: Sequence[Tile], functions: Sequence[JITFunction], gate: str | None = None) -> list[Candidate]:
    """The first of `functions` behind the rounding of x, with each of the tiles."""
    first, scratch = rounded(product, gate)
    operands = {"x": Operand(scratch=0), "x_scale": Operand(scratch=1), "weight": Operand(arg="weight"), "scale": Operand(arg="scale")}
    constants = product.constants("WORDS", "BITS", "MIDDLE", "PANEL") | {"X_SCALES": scratch[1].shape[1]}
    return [gemm(product, functions, operands, constants, t, (first,), scratch) for t in wanted]


def library(product: Product, gate: str | None = None) -> list[Candidate]:
    """cuBLASLt's product of float8 codes with a scale for each row of both; what follows it is a kernel of its own."""
    args, n = product.call.args, product.call.args["n"]
    if not multiplies_codes(args["format"], args["activation"], product.x.dtype, n, product.k):
        return []
    first, scratch = rounded(product, gate)
    operands = (Operand(out=0), Operand(scratch=0), Operand(scratch=1), Operand(arg="weight"), Operand(arg="scale"))
    multiply = Launch(Source("library", "torch", "scaled_mm", ""), operands)
    rank = 0.5 if product.steps.max_tokens <= 64 else -1.0
    if not product.act:
        adds = [Launch(Source("library", "torch", "add", ""), (Operand(out=0), Operand(arg=n))) for n in ("bias", "residual") if args[n] is not None]
        return [Candidate("library", (first, multiply, *adds), scratch, rank)]
    if args["bias"] is not None:
        return []
    gate_up = Tensor(product.x.dtype, (product.tokens, n))
    inner = Call("glu", {"gate_up": gate_up, "act": product.act}, product.call.results)
    head = Candidate("library", (first, multiply), scratch)
    return [replace(chain(head, gate_up, "gate_up", glu), rank=rank) for glu in claimants(inner, product.steps, product.target)[:1]]
