"""Mixtures of experts with quantized weights: the products of `moe.py`, with matrices that are widened in registers.

Codes are read as products with one matrix read them: by `quantized_gemv` where pairs are few, else by `weight_only_gemm`; a row of them lies alone
(a panel of 1), as it did when these were measured: in panels, and on another card, Mixtral took a fifth longer at batch 1. Symmetric ones of
eight bits are also what the products of floats read, with a scale beside them, and the only way where several rows share a scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import triton
import triton.language as tl

from ..dims import Dim
from ..kernel import Call, Candidate, Launch, Operand, Steps, Tensor, claims
from ..target import Target
from .activations import activate, tanh
from .dequantize import MAGIC, nibble_pairs, register_rows, runs_of, widen_bytes, widen_nibbles
from .moe import ExpertsProduct, MatrixProduct, candidates, gated
from .product_tile import tile_at
from .quantize import row_scale
from .quantized_gemm import Tile, fitting
from .quantized_gemv import SIXTEEN, as_codes, codes_of, columns_of, nibble, product_of, product_of_bytes, product_of_words, rounded_row
from .quantized_gemv import TILES as GEMV_TILES
from .quantized_product import CHUNK, Weights, word_of
from .source import FLOATS, power_of_two, supported
from .weight_only_gemm import TILES, widen_tile

AT_ONCE = 16
"""Pairs whose rows a GEMV's program multiplies, all of them unrolled."""


@triton.jit
def row_product(x, weight, w_scale, zero, row, sixteen, K: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                MIDDLE: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Rows `row` [N] of the weight times the row x [K] → [N]."""
    words = (weight + row * WORDS)[:, None]
    scale_row = (w_scale + row * SCALES)[:, None]
    zero_row = None
    if zero is not None:
        zero_row = (zero + row * SCALES)[:, None]
    w = codes_of(words, 0, WORDS, BITS, BLOCK_K, 1)
    acc = product_of(w, sixteen, scale_row, zero_row, x, None, 0, 0.0, K, BITS, GROUP, SCALES, MIDDLE, None, 0, None, 0.0, 1)
    for begin in tl.range(BLOCK_K, K, BLOCK_K, num_stages=1):
        w = codes_of(words, begin, WORDS, BITS, BLOCK_K, 1)
        acc += product_of(w, sixteen, scale_row, zero_row, x, None, begin, 0.0, K, BITS, GROUP, SCALES, MIDDLE, None, 0, None, 0.0, 1)
    h = tl.sum(acc, 1)
    if GROUP == 0:
        h *= tl.load(w_scale + row).to(tl.float32)
    return h


@triton.jit
def experts_gemv_kernel(x, ids, weight, w_scale, zero, bias, scale, out, sixteen, X: tl.constexpr, SHARED: tl.constexpr, SUM: tl.constexpr, N: tl.constexpr,
                        K: tl.constexpr, WIDTH: tl.constexpr, UP: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                        SCALES: tl.constexpr, MIDDLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACT: tl.constexpr,
                        PDL: tl.constexpr):  # fmt: skip
    """`moe.grouped_gemv_kernel` with matrices [WIDTH, K] whose rows have WORDS elements of memory."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(n, N - 1)
    h = tl.zeros([BLOCK_N], tl.float32)
    u = h
    for i in tl.static_range(SUM):
        pair = row * SUM + i
        expert = tl.load(ids + pair)
        known = (expert >= 0) & (expert < X)
        factor = tl.where(known, 1.0, 0.0)
        if scale is not None:
            factor *= tl.load(scale + pair).to(tl.float32)
        at = tl.where(known, expert, 0).to(tl.int64) * WIDTH + inside
        token = x + (pair // SHARED).to(tl.int64) * K
        y = row_product(token, weight, w_scale, zero, at, sixteen, K, WORDS, BITS, GROUP, SCALES, MIDDLE, BLOCK_K)
        if bias is not None:
            y += tl.load(bias + at).to(tl.float32)
        h += y * factor
        if UP > 0:
            v = row_product(token, weight, w_scale, zero, at + UP, sixteen, K, WORDS, BITS, GROUP, SCALES, MIDDLE, BLOCK_K)
            if bias is not None:
                v += tl.load(bias + at + UP).to(tl.float32)
            u += v * factor
    if UP > 0:
        h = gated(h, u, ACT)
    elif ACT is not None:
        h = activate(h, ACT)
    tl.store(out + row.to(tl.int64) * N + n, h.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def experts_gemm_kernel(x, order, experts, weight, w_scale, zero, magic, bias, scale, out, num_pairs, depth, X: tl.constexpr, SHARED: tl.constexpr,
                        N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, UP: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr,
                        GROUP: tl.constexpr, SCALES: tl.constexpr, MIDDLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                        BLOCK_K: tl.constexpr, HEIGHT: tl.constexpr, ACT: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """`moe.grouped_gemm_kernel` with tiles weight · xᵀ, as `weight_only_gemm` has them."""
    dtype: tl.constexpr = x.dtype.element_ty
    WARPS: tl.constexpr = THREADS // 32
    EVEN: tl.constexpr = K % BLOCK_K == 0
    EACH: tl.constexpr = GROUP if GROUP > 0 else 128
    RUNS: tl.constexpr = max(BLOCK_K // EACH, 1) if GROUP > 0 else 1
    FOLD: tl.constexpr = GROUP > 0 and (RUNS > 1 or BLOCK_M >= 64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    first_n, tile_m = tile_at(BLOCK_N, 1, HEIGHT)
    expert = tl.load(experts + tile_m)
    if expert < 0:
        return
    pair = tl.load(order + tile_m * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = (pair < num_pairs)[None, :]
    n = first_n + tl.arange(0, BLOCK_N)
    first = tl.minimum(expert, X - 1).to(tl.int64) * WIDTH
    held = first + tl.minimum(first_n + (register_rows(BLOCK_N, WARPS) if BITS == 4 else tl.arange(0, BLOCK_N)), N - 1)
    plain = first + tl.minimum(n, N - 1)
    k = tl.arange(0, BLOCK_K)
    x_row = x + (tl.minimum(pair, num_pairs - 1) // SHARED).to(tl.int64)[None, :] * K + k[:, None]
    row = weight + held * WORDS
    scale_row = w_scale + (held if FOLD else plain) * SCALES
    s = None
    t = None
    z = None
    y = None
    if GROUP > 0:
        s = runs_of(scale_row, 0, EACH, SCALES, RUNS, 1)
        if UP > 0:
            t = runs_of(scale_row + UP * SCALES, 0, EACH, SCALES, RUNS, 1)
    if zero is not None:
        zero_row = zero + held * SCALES
        z = runs_of(zero_row, 0, EACH, SCALES, RUNS, 1).to(dtype)
        if UP > 0:
            y = runs_of(zero_row + UP * SCALES, 0, EACH, SCALES, RUNS, 1).to(dtype)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = acc
    for begin in range(0, tl.where(expert < X, depth, 0), BLOCK_K):
        if EVEN:
            h = tl.load(x_row + begin, mask=valid, other=0.0)
        else:
            h = tl.load(x_row + begin, mask=(begin + k < K)[:, None] & valid, other=0.0)
        w = widen_tile(row, z, s.to(dtype) if FOLD else None, magic, begin, K, WORDS, BITS, MIDDLE, BLOCK_K, EVEN, WARPS, 1, dtype)
        if GROUP > 0 and not FOLD:
            acc += tl.dot(w, h) * s.to(tl.float32)
        else:
            acc = tl.dot(w, h, acc)
        if UP > 0:
            v = widen_tile(row + UP * WORDS, y, t.to(dtype) if FOLD else None, magic, begin, K, WORDS, BITS, MIDDLE, BLOCK_K, EVEN, WARPS, 1, dtype)
            if GROUP > 0 and not FOLD:
                up += tl.dot(v, h) * t.to(tl.float32)
            else:
                up = tl.dot(v, h, up)
        if GROUP > 0:
            s = runs_of(scale_row, begin + BLOCK_K, EACH, SCALES, RUNS, 1)
            if UP > 0:
                t = runs_of(scale_row + UP * SCALES, begin + BLOCK_K, EACH, SCALES, RUNS, 1)
            if zero is not None:
                z = runs_of(zero_row, begin + BLOCK_K, EACH, SCALES, RUNS, 1).to(dtype)
                if UP > 0:
                    y = runs_of(zero_row + UP * SCALES, begin + BLOCK_K, EACH, SCALES, RUNS, 1).to(dtype)
    if GROUP == 0:
        acc *= tl.load(scale_row).to(tl.float32)[:, None]
        if UP > 0:
            up *= tl.load(scale_row + UP * SCALES).to(tl.float32)[:, None]
    if bias is not None:
        inside = (n < N) & (expert < X)
        acc += tl.load(bias + plain, mask=inside, other=0.0).to(tl.float32)[:, None]
        if UP > 0:
            up += tl.load(bias + plain + UP, mask=inside, other=0.0).to(tl.float32)[:, None]
    if UP > 0:
        acc = gated(acc, up, ACT)
    elif ACT is not None:
        acc = activate(acc, ACT)
    if scale is not None:
        acc *= tl.load(scale + pair, mask=pair < num_pairs, other=0.0).to(tl.float32)[None, :]
    to = pair.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=valid & (n < N)[:, None])


@dataclass(frozen=True)
class WidenedProduct(ExpertsProduct):
    """With matrices of any format."""

    weights: Weights

    @classmethod
    def of(cls, call: Call, weights: Weights, side: str, x: Operand, k: int, *, shared: int = 1, scale: str = "", gated: bool = False,
           act: str | None = None) -> WidenedProduct:  # fmt: skip
        experts, width, words = call.args[f"w_{side}"].shape
        _, _, *groups = call.args[f"s_{side}"].shape
        n = width // 2 if gated else width
        operands = {"x": x} | {p: Operand(arg=f"{a}_{side}") for p, a in (("weight", "w"), ("w_scale", "s"), ("zero", "z"), ("bias", "b"))}
        constants = {"X": experts, "SHARED": shared, "N": n, "K": k, "WIDTH": width, "UP": n if gated else 0, "WORDS": words, "BITS": weights.bits,
                     "GROUP": weights.group, "SCALES": math.prod(groups), "MIDDLE": weights.middle, "ACT": act}  # fmt: skip
        if scale:
            operands["scale"] = Operand(arg=scale)
        else:
            constants["scale"] = None
        return cls(call, operands, constants, weights)

    def tiles(self, height: float, steps: Steps) -> tuple[Tile, ...]:
        few, some, many = (TILES.of(rows, self.pieces == 2, False) for rows in (1, 64, 65))
        if steps.deterministic:
            return some
        if height <= 24:
            return few if height <= 4 else (*few[:2], *some[:2])
        return (*some[:2], *many[:2]) if height <= 96 else many

    def blocks(self, pairs: int) -> list[tuple[int, int, int]]:
        found = []
        for n, k, warps in GEMV_TILES:
            k = max(CHUNK, min(k, power_of_two(self.k)))
            while warps > 1 and k < 512 * warps:  # a thread reads 16 codes of a row at least
                warps //= 2
            found.append((n // self.pieces, k, warps))
        return list(dict.fromkeys(found)) if pairs <= AT_ONCE else []

    def fitted(self, tile: Tile, target: Target) -> list[Tile]:
        return fitting([tile], self.weights, self.pieces, self.n, self.k, self.call.args["x"].dtype, target)

    def gemv(self, rows: Dim, summed: int, block: tuple[int, int, int], out: Operand, scratch: tuple[Tensor, ...]) -> Launch:
        sixteen = {"sixteen": Operand(const=SIXTEEN)} if self.weights.bits == 4 else {}
        functions = [experts_gemv_kernel, row_product, product_of, product_of_words, product_of_bytes, codes_of, word_of, columns_of, rounded_row, as_codes,
                     nibble, row_scale, gated, activate, tanh]  # fmt: skip
        return self.of_pairs(functions, rows, summed, block, out, scratch, sixteen, {} if sixteen else {"sixteen": None})

    def gemm(self, tile: Tile, pairs: Dim, slots: Dim, order: int, out: Operand, scratch: tuple[Tensor, ...]) -> Launch:
        magic = {"magic": Operand(const=MAGIC[self.call.args["x"].dtype])}
        functions = [experts_gemm_kernel, widen_tile, word_of, widen_nibbles, nibble_pairs, register_rows, widen_bytes, runs_of, tile_at, gated, activate,
                     tanh]  # fmt: skip
        return self.of_tiles(functions, tile, pairs, slots, order, out, scratch, magic, {"THREADS": 32 * tile.warps})


@claims("quantized_moe", "triton")
def quantized_moe(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """Rows of x are not rounded."""
    args, weights = call.args, Weights.of(call.args["format"])
    if weights is None or args["activation"] != "none" or not supported(call, target) or args["x"].dtype not in FLOATS[:2]:
        return []
    inner, (tokens, active) = args["inner"], args["expert_ids"].shape
    if any(n % weights.rows for n in (inner, args["w_in"].shape[1], args["w_out"].shape[1])):
        return []
    into = {"shared": active, "gated": args["gated"], "act": args["act"]}
    found = []
    if weights.rows == 1:
        first = WidenedProduct.of(call, weights, "in", Operand(arg="x"), args["x"].shape[1], **into)
        second = WidenedProduct.of(call, weights, "out", Operand(scratch=0), inner, scale="expert_weights")
        found = candidates(call, steps, target, tokens, active, [first, second])
    if weights.bits == 4 or weights.zero:
        return found
    of = {"transposed": False, "quantized": weights}
    one = MatrixProduct.of(call, Operand(arg="x"), "w_in", "b_in", **of, **into, w_scale="s_in")
    two = MatrixProduct.of(call, Operand(scratch=0), "w_out", "b_out", **of, scale="expert_weights", w_scale="s_out")
    return candidates(call, steps, target, tokens, active, [one, two]) + [replace(c, name=f"widened_{c.name}", rank=c.rank + 1) for c in found]
