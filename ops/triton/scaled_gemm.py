"""Products of codes: weights and activations in eight bits meet on the matrix units, and scales multiply what comes out."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

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
def gate_and_up(first, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows [2 · BLOCK_N] of a weight gate | up, [2N, K]: in turns, eight of gate's from `first` on and the same of up's.

    Of 16 rows of a product a thread has two that are eight apart: those that meet in the unit. And one product of twice the rows reads x once.
    """
    i = tl.arange(0, 2 * BLOCK_N)
    return tl.minimum(first + i // 16 * 8 + i % 8, N - 1) + i % 16 // 8 * N


@triton.jit
def apart(h):
    """h [2N, M] of rows in the order of `gate_and_up` → gate and up, [N, M] each."""
    N: tl.constexpr = h.shape[0] // 2
    M: tl.constexpr = h.shape[1]
    gate, up = tl.split(tl.permute(tl.reshape(h, [N // 8, 2, 8, M]), (0, 2, 3, 1)))
    return tl.reshape(gate, [N, M]), tl.reshape(up, [N, M])


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
    if ACT is None:
        held = tl.minimum(n, N - 1).to(tl.int64)
    else:
        held = gate_and_up(first_n, N, BLOCK_N).to(tl.int64)
    token = tl.minimum(m, num_rows - 1).to(tl.int64)
    depth: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    start = tl.program_id(2) * depth
    k = tl.arange(0, BLOCK_K)
    row = weight + held * K
    scale_row = scale + held // SCALE_ROWS * SCALES
    if GROUP == 0:  # what is needed at the end is asked for at the beginning
        by = tl.load(scale_row)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch_rows(row + start, held.shape[0], PREFETCH, THREADS)
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
    acc = tl.zeros([held.shape[0], BLOCK_M], tl.int32 if weight.dtype.element_ty == tl.int8 and GROUP + X_GROUP == 0 else tl.float32)
    s = None
    x_s = None
    if GROUP > 0:
        s = tl.load(scale_row + tl.minimum(start // GROUP, SCALES - 1))  # splits of K may end in blocks without columns
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
        if GROUP > 0:
            s = tl.load(scale_row + tl.minimum((begin + BLOCK_K) // GROUP, SCALES - 1))
        if X_GROUP > 0:
            x_s = tl.load(x_scale_row + tl.minimum((begin + BLOCK_K) // X_GROUP, X_SCALES - 1))
    h = acc.to(tl.float32)
    if GROUP == 0:
        h *= by.to(tl.float32)[:, None]
    if X_GROUP == 0:
        h *= x_by[None, :]
    if EARLY:
        h += added.to(tl.float32)
    u = h
    if ACT is not None:
        h, u = apart(h)
    finish_tile(h, u, bias, None if EARLY else residual, out, partial, tickets, m[None, :], n[:, None], num_rows, N, SPLIT, ACT)


def scaled_gemms(product: Product, gate: str | None = None) -> list[Candidate]:
    """x is rounded in a launch of its own, which does what stands before the product too: a norm, or the unit `gate`."""
    first, scratch = rounded(product, gate)
    operands = {"x": Operand(scratch=0), "x_scale": Operand(scratch=1), "weight": Operand(arg="weight"), "scale": Operand(arg="scale")}
    constants = product.constants("WORDS", "BITS", "MIDDLE", "PANEL") | {"X_SCALES": scratch[1].shape[1]}
    functions = [scaled_gemm_kernel, multiply_codes, gate_and_up, apart]
    return [gemm(product, functions, operands, constants, t, (first,), scratch) for t in tiles(product, TILES)]


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
