"""Mixtures of experts: rows of x, each times the matrix of its expert.

Few (token, expert) pairs: a GEMV each, which reads its expert's rows straight from the ids. More: one launch sorts the pairs by expert
into tiles of one expert each, and a grouped GEMM walks these (MegaBlocks: Gale et al. 2022). The host never learns how many pairs an expert
has, so there are as many tiles as there can be, and those without pairs end at once. A weight is read once for all pairs of its
expert, up to the height of a tile; pairs keep their order within an expert, so that equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from ..dims import Dim, product
from ..kernel import Call, Candidate, Launch, Operand, Steps, Tensor, claims
from ..target import Target
from .activations import activate, tanh
from .linear import EXACT, FEW_ROWS, GEMV_TILES, MANY_ROWS, SOME_ROWS, Tile, fitted
from .product_tile import tile_at
from .quantized_product import Weights
from .source import FLOATS, launch, most, power_of_two, supported

GEMV_PAIRS = 32
"""Up to so many pairs, or as many as there are experts, are multiplied one by one: few share an expert, and those find its rows in L2."""
TRANSPOSED_GEMV_TILES = ((64, 64, 4), (128, 32, 4), (64, 128, 8), (256, 32, 8))
"""Of weights whose columns lie together: columns of the result, depth, warps."""
UNROLLED = 64
"""Blocks of the weight that a GEMV's program reads, all of them unrolled."""
CHUNK = 2048
"""Pairs that a program looks at together while they are sorted."""


@triton.jit
def buckets(ids, at, num_pairs, X: tl.constexpr, BINS: tl.constexpr):
    """The expert of each pair; X for an id outside the table, which means "no expert", and BINS − 1 behind the end."""
    expert = tl.load(ids + at, mask=at < num_pairs, other=0)
    expert = tl.where((expert >= 0) & (expert < X), expert, X).to(tl.int32)
    return tl.where(at < num_pairs, expert, BINS - 1)


@triton.jit
def sort_pairs_kernel(ids, order, experts, num_pairs, num_slots, X: tl.constexpr, BINS: tl.constexpr, HEIGHT: tl.constexpr, CHUNK: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """Program e lists the pairs of expert e in tiles of HEIGHT slots: `order`, filled up with num_pairs, and the tiles' expert in `experts`.

    Every program counts all pairs, which are few and in L2: none waits for another. The last one has the pairs without an expert, and marks the
    tiles that nobody uses with −1.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    b = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for begin in range(0, num_pairs, CHUNK):
        counts += tl.histogram(buckets(ids, begin + i, num_pairs, X, BINS), BINS)
    tiles = (counts + HEIGHT - 1) // HEIGHT
    first = tl.sum(tl.where(b < expert, tiles, 0), 0)
    own = tl.sum(tl.where(b == expert, tiles, 0), 0)
    seen = tl.full([], 0, tl.int32)
    order += first * HEIGHT
    for begin in range(0, num_pairs, CHUNK):
        mine = (buckets(ids, begin + i, num_pairs, X, BINS) == expert).to(tl.int32)
        tl.store(order + seen + tl.cumsum(mine, 0) - 1, begin + i, mask=mine == 1)
        seen += tl.sum(mine, 0)
    rest = seen + tl.arange(0, HEIGHT)
    tl.store(order + rest, tl.zeros([HEIGHT], tl.int32) + num_pairs, mask=rest < own * HEIGHT)
    for begin in range(0, own, BINS):
        tl.store(experts + first + begin + b, tl.zeros([BINS], tl.int32) + expert, mask=begin + b < own)
    if expert == X:
        num_tiles = (num_slots + HEIGHT - 1) // HEIGHT
        for begin in range(first + own, num_tiles, BINS):
            tl.store(experts + begin + b, tl.full([BINS], -1, tl.int32), mask=begin + b < num_tiles)


@triton.jit
def multiply(acc, h, w, scale_row, begin, GROUP: tl.constexpr, PRECISION: tl.constexpr):
    """acc + h · w, with w widened to the type of h; where columns share a scale by GROUP, times those of `begin`, at pointers scale_row [N]."""
    if GROUP > 0:
        s = tl.load(scale_row + begin // GROUP).to(tl.float32)
        return acc + tl.dot(h, w.to(h.dtype)) * s[None, :]
    else:
        return tl.dot(h, w.to(h.dtype), acc, input_precision=PRECISION)


@triton.jit
def gated(h, u, ACT: tl.constexpr):
    """`ops.glu.GATES`, of float32 blocks."""
    if ACT == "swiglu_oai":
        h = tl.where(h > 7.0, 7.0, h)  # NaN stays NaN
        u = tl.where(u > 7.0, 7.0, tl.where(u < -7.0, -7.0, u))
        return (u + 1.0) * h / (1.0 + tl.exp(-1.702 * h))
    else:
        return activate(h, ACT) * u


@triton.jit
def grouped_gemm_kernel(x, order, experts, weight, w_scale, bias, scale, out, num_pairs, depth, X: tl.constexpr, SHARED: tl.constexpr, N: tl.constexpr,
                        K: tl.constexpr, WIDTH: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, STEP: tl.constexpr, UP: tl.constexpr,
                        GROUP: tl.constexpr, SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_K: tl.constexpr, HEIGHT: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out [pairs, N], row by row scale · act(x[pair // SHARED] · weight[expert] + bias[expert]).

    Column n of the result is column STEP · n of an expert's WIDTH; UP columns further lies that of the up projection, if UP is not 0. `depth`
    is K, unknown to the compiler so that it does not unroll the loop. Of a quantized weight, GROUP columns (0: all) of SCALE_ROWS rows share one
    of a row's SCALES in w_scale.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    first_n, tile_m = tile_at(BLOCK_N, 1, HEIGHT)
    n = first_n + tl.arange(0, BLOCK_N)
    expert = tl.load(experts + tile_m)
    if expert < 0:
        return
    pair = tl.load(order + tile_m * BLOCK_M + tl.arange(0, BLOCK_M))
    k = tl.arange(0, BLOCK_K)
    used = (pair < num_pairs)[:, None]  # what is not is not read
    a = x + (tl.minimum(pair, num_pairs - 1) // SHARED).to(tl.int64)[:, None] * K + k[None, :]
    b = weight + expert.to(tl.int64) * (WIDTH * K) + (STEP * n)[None, :] * STRIDE_N + k[:, None] * STRIDE_K
    scale_row = w_scale
    up_scale_row = w_scale
    if w_scale is not None:
        scaled = tl.minimum(STEP * n, WIDTH - 1) // SCALE_ROWS
        scale_row = w_scale + (tl.minimum(expert, X - 1) * (WIDTH // SCALE_ROWS) + scaled) * SCALES
        up_scale_row = scale_row + UP // SCALE_ROWS * SCALES
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = acc
    for begin in range(0, tl.where(expert < X, depth, 0), BLOCK_K):
        if K % BLOCK_K == 0:
            h = tl.load(a + begin, mask=used, other=0.0)
        else:
            h = tl.load(a + begin, mask=used & (begin + k < K)[None, :], other=0.0)
        if K % BLOCK_K == 0 and N % BLOCK_N == 0:
            w = tl.load(b + begin * STRIDE_K)
            if UP > 0:
                v = tl.load(b + begin * STRIDE_K + UP * STRIDE_N)
        else:
            there = (begin + k < K)[:, None] & (n < N)[None, :]
            w = tl.load(b + begin * STRIDE_K, mask=there, other=0.0)
            if UP > 0:
                v = tl.load(b + begin * STRIDE_K + UP * STRIDE_N, mask=there, other=0.0)
        acc = multiply(acc, h, w, scale_row, begin, GROUP, PRECISION)
        if UP > 0:
            up = multiply(up, h, v, up_scale_row, begin, GROUP, PRECISION)
    if (w_scale is not None) & (GROUP == 0):
        acc *= tl.load(scale_row).to(tl.float32)[None, :]
        if UP > 0:
            up *= tl.load(up_scale_row).to(tl.float32)[None, :]
    inside = (n < N) & (expert < X)
    if bias is not None:
        at = bias + expert * WIDTH + STEP * n
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
        if UP > 0:
            up += tl.load(at + UP, mask=inside, other=0.0).to(tl.float32)[None, :]
    if UP > 0:
        acc = gated(acc, up, ACT)
    elif ACT is not None:
        acc = activate(acc, ACT)
    if scale is not None:
        acc *= tl.load(scale + pair, mask=pair < num_pairs, other=0.0).to(tl.float32)[:, None]
    to = pair.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=used & (n < N)[None, :])


@triton.jit
def grouped_gemv_kernel(x, ids, weight, w_scale, bias, scale, out, X: tl.constexpr, SHARED: tl.constexpr, SUM: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                        WIDTH: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, STEP: tl.constexpr, UP: tl.constexpr,
                        GROUP: tl.constexpr, SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                        ACT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The same for one pair, or for the SUM pairs of a token, whose results are added up. Programs side by side have the same columns."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = acc
    added = tl.zeros([BLOCK_N], tl.float32)
    added_up = added
    for i in tl.static_range(SUM):
        pair = row * SUM + i
        expert = tl.load(ids + pair)
        known = (expert >= 0) & (expert < X)
        expert = tl.where(known, expert, 0).to(tl.int64)
        factor = tl.where(known, 1.0, 0.0)
        if scale is not None:
            factor *= tl.load(scale + pair).to(tl.float32)
        b = weight + expert * (WIDTH * K) + (STEP * n)[:, None] * STRIDE_N + k * STRIDE_K
        if w_scale is not None:
            scaled = tl.minimum(STEP * n, WIDTH - 1) // SCALE_ROWS
            scale_row = w_scale + ((expert * (WIDTH // SCALE_ROWS) + scaled) * SCALES)[:, None]
            up_scale_row = scale_row + UP // SCALE_ROWS * SCALES
        for begin in tl.static_range(0, K, BLOCK_K):
            inside = (begin + k < K) & (n < N)[:, None] & known
            w = tl.load(b + begin * STRIDE_K, mask=inside, other=0.0).to(tl.float32)
            h = tl.load(x + (pair // SHARED).to(tl.int64) * K + begin + k, mask=begin + k < K, other=0.0).to(tl.float32) * factor
            if w_scale is not None:
                group = (begin + k) // GROUP if GROUP > 0 else 0
                w *= tl.load(scale_row + group, mask=begin + k < K, other=0.0).to(tl.float32)
            acc += w * h
            if UP > 0:
                v = tl.load(b + begin * STRIDE_K + UP * STRIDE_N, mask=inside, other=0.0).to(tl.float32)
                if w_scale is not None:
                    v *= tl.load(up_scale_row + group, mask=begin + k < K, other=0.0).to(tl.float32)
                up += v * h
        if bias is not None:
            at = bias + expert * WIDTH + STEP * n
            added += tl.load(at, mask=n < N, other=0.0).to(tl.float32) * factor
            if UP > 0:
                added_up += tl.load(at + UP, mask=n < N, other=0.0).to(tl.float32) * factor
    y = tl.sum(acc, 1) + added
    if UP > 0:
        y = gated(y, tl.sum(up, 1) + added_up, ACT)
    elif ACT is not None:
        y = activate(y, ACT)
    tl.store(out + row.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def sum_pairs_kernel(pairs, out, N: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out [T, N]: of each token, its SUM rows of pairs."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(SUM):
        y += tl.load(pairs + (row * SUM + i) * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, y.to(out.dtype.element_ty), mask=n < N)


@dataclass(frozen=True)
class ExpertsProduct:
    """Rows times the matrices of their experts. `constants` says how a matrix and its columns lie, and what is done to the result."""

    call: Call
    operands: dict[str, Operand]  # x, weight, w_scale, zero, bias, scale
    constants: dict[str, Any]

    @property
    def n(self) -> int:
        """Columns of the result."""
        n: int = self.constants["N"]
        return n

    @property
    def k(self) -> int:
        k: int = self.constants["K"]
        return k

    @property
    def pieces(self) -> int:
        """Matrices that a program reads side by side."""
        return 2 if self.constants["UP"] else 1

    def of_pairs(self, functions: list[Any], rows: Dim, summed: int, block: tuple[int, int, int], out: Operand, scratch: tuple[Tensor, ...],
                 operands: dict[str, Operand], constants: dict[str, Any]) -> Launch:  # fmt: skip
        """A launch of the first of `functions` for `rows` rows of the result, each of `summed` pairs; with `operands` and `constants` of its own."""
        n, k, warps = block
        operands = self.operands | operands | {"ids": Operand(arg="expert_ids"), "out": out}
        constants = self.constants | constants | {"SUM": summed, "BLOCK_N": n, "BLOCK_K": k}
        grid = ((rows, 1), (self.n, n))
        return launch(self.call, functions, in_order(functions[0], operands), constants, grid, scratch=scratch, num_warps=warps)

    def of_tiles(self, functions: list[Any], tile: Any, pairs: Dim, slots: Dim, order: int, out: Operand, scratch: tuple[Tensor, ...],
                 operands: dict[str, Operand], constants: dict[str, Any]) -> Launch:  # fmt: skip
        """The same for tiles of sorted pairs. `order`: of the scratch tensors, the first of the two that the sort makes."""
        sorted_pairs = {"order": Operand(scratch=order), "experts": Operand(scratch=order + 1), "num_pairs": Operand(size=pairs)}
        operands = self.operands | operands | sorted_pairs | {"depth": Operand(const=self.k), "out": out}
        constants = self.constants | constants | {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "HEIGHT": 8}
        grid = ((slots, tile.m), (self.n, tile.n))
        return launch(self.call, functions, in_order(functions[0], operands), constants, grid, scratch=scratch, num_warps=tile.warps, num_stages=tile.stages)


class MatrixProduct(ExpertsProduct):
    """With matrices of floats, or of eight bits with a scale beside them."""

    @classmethod
    def of(cls, call: Call, x: Operand, weight: str, bias: str, transposed: bool, *, shared: int = 1, scale: str = "", gated: bool = False,
           interleaved: bool = False, act: str | None = None, w_scale: str = "", quantized: Weights | None = None) -> MatrixProduct:  # fmt: skip
        experts, *matrix = call.args[weight].shape
        width, k = matrix[::-1] if transposed else matrix
        n = width // 2 if gated else width
        operands = {"x": x, "weight": Operand(arg=weight), "bias": Operand(arg=bias)}
        operands |= {p: Operand(arg=a) for p, a in (("w_scale", w_scale), ("scale", scale)) if a}
        constants = {"X": experts, "SHARED": shared, "N": n, "K": k, "WIDTH": width, "STRIDE_N": 1 if transposed else k,
                     "STRIDE_K": width if transposed else 1, "STEP": 2 if gated and interleaved else 1,
                     "UP": 0 if not gated else 1 if interleaved else n, "ACT": act, "GROUP": quantized.group if quantized else 0,
                     "SCALES": call.args[w_scale].shape[2] if quantized and quantized.group else 1,
                     "SCALE_ROWS": quantized.rows if quantized else 1}  # fmt: skip
        constants |= {p: None for p, a in (("w_scale", w_scale), ("scale", scale)) if not a}
        return cls(call, operands, constants)

    def blocks(self, pairs: int) -> list[tuple[int, int, int]]:
        """Blocks of the weight for a GEMV program that reads those of `pairs` pairs, best first."""
        found = []
        for n, k, warps in TRANSPOSED_GEMV_TILES if self.constants["STRIDE_N"] == 1 else GEMV_TILES:
            while warps > 1 and -self.k % k > self.k // 8:  # a thread reads as much as before, and less of it lies behind the end
                k, warps = k // 2, warps // 2
            k = min(k, power_of_two(self.k))
            if pairs * -(-self.k // k) <= UNROLLED:
                found.append((min(n // self.pieces, power_of_two(self.n)), k, warps))
        return list(dict.fromkeys(found))

    def tiles(self, height: float, steps: Steps) -> tuple[Tile, ...]:
        """For so many rows of each expert; of deterministic steps, whatever their size, the same."""
        if self.call.args["x"].dtype == torch.float32:
            return EXACT[:1] if height <= 16 else EXACT
        if steps.deterministic:
            return SOME_ROWS[:4]
        if height <= 24:
            return FEW_ROWS[:4] if height <= 4 else (*FEW_ROWS[:2], *SOME_ROWS[:3])
        return (*SOME_ROWS[:3], *MANY_ROWS[:2]) if height <= 96 else MANY_ROWS

    def fitted(self, tile: Tile, target: Target) -> list[Tile]:
        """The tile as the product's size, and the groups of its weight, let it be; none if it does not fit."""
        tile = replace(tile, k=min(tile.k, self.constants["GROUP"] or tile.k))
        return fitted([tile], self.call.args["x"].dtype, self.pieces, self.n, self.k, target)

    def gemv(self, rows: Dim, summed: int, block: tuple[int, int, int], out: Operand, scratch: tuple[Tensor, ...]) -> Launch:
        return self.of_pairs([grouped_gemv_kernel, gated, activate, tanh], rows, summed, block, out, scratch, {}, {})

    def gemm(self, tile: Tile, pairs: Dim, slots: Dim, order: int, out: Operand, scratch: tuple[Tensor, ...]) -> Launch:
        precision = {"PRECISION": "ieee" if self.call.args["x"].dtype == torch.float32 else None}
        functions = [grouped_gemm_kernel, tile_at, multiply, gated, activate, tanh]
        return self.of_tiles(functions, tile, pairs, slots, order, out, scratch, {}, precision)


def in_order(kernel: Any, operands: dict[str, Operand]) -> dict[str, Operand]:
    return {p: operands[p] for p in kernel.arg_names if p in operands}


def _slots(pairs: Dim, experts: int, height: int, steps: Steps) -> Dim:
    """Places in tiles of `height` pairs: of each expert the last tile may hold but one. No more than a tile for each pair."""
    form = {"": pairs} if isinstance(pairs, int) else pairs
    slots: Dim = form | {"": form.get("", 0) + (experts + 1) * (height - 1)}
    return product(pairs, height) if most(pairs, steps) * height <= most(slots, steps) else slots


def _sort(call: Call, steps: Steps, pairs: Dim, slots: Dim, experts: int, height: int, order: int, scratch: tuple[Tensor, ...]) -> Launch:
    operands = {"ids": Operand(arg="expert_ids"), "order": Operand(scratch=order), "experts": Operand(scratch=order + 1),
                "num_pairs": Operand(size=pairs), "num_slots": Operand(size=slots)}  # fmt: skip
    chunk = min(CHUNK, max(power_of_two(most(pairs, steps)), 128))
    constants = {"X": experts, "BINS": power_of_two(experts + 2), "HEIGHT": height, "CHUNK": chunk}
    return launch(call, [sort_pairs_kernel, buckets], operands, constants, ((experts + 1, 1),), scratch=scratch)


def candidates(call: Call, steps: Steps, target: Target, tokens: Dim, active: int, products: Sequence[Any]) -> list[Candidate]:
    """Products, `MatrixProduct` or alike, one after the other; what the last one makes of the `active` pairs of a token is added up."""
    dtype, pairs, experts = call.args["x"].dtype, product(tokens, active), products[0].constants["X"]
    *inner, last = products
    middle = tuple(Tensor(dtype, (pairs, p.n)) for p in inner)
    found: list[Candidate] = []
    if most(pairs, steps) <= max(GEMV_PAIRS, experts) and not steps.deterministic:
        for *blocks, end in list(zip(*(p.blocks(1) for p in inner), last.blocks(active), strict=False))[: 3 if most(tokens, steps) == 1 else 2]:
            launches = [p.gemv(pairs, 1, b, Operand(scratch=i), middle) for i, (p, b) in enumerate(zip(inner, blocks, strict=True))]
            launches.append(last.gemv(tokens, active, end, Operand(out=0), middle))
            name = "+".join("n{}_k{}_w{}".format(*b) for b in (*blocks, end))
            found.append(Candidate(f"gemv_{name}", tuple(launches), middle, rank=(0.0 if most(tokens, steps) <= 4 else 2.0) + len(found) / 10))
    if found and most(tokens, steps) == 1:
        return found
    for tile in products[0].tiles(most(pairs, steps) / min(experts, most(pairs, steps)), steps):
        fits = [p.fitted(tile, target) for p in products]
        if not all(fits):
            continue
        tiles = [f[0] for f in fits]
        apart = (Tensor(dtype, (pairs, last.n)),) if active > 1 else ()
        slots = _slots(pairs, experts, tile.m, steps)
        scratch = (*middle, *apart, Tensor(torch.int32, (slots,)), Tensor(torch.int32, (slots,)))
        order, end_operand = len(middle) + len(apart), Operand(scratch=len(middle)) if apart else Operand(out=0)
        outs = [*(Operand(scratch=i) for i in range(len(inner))), end_operand]
        launches = [_sort(call, steps, pairs, slots, experts, tile.m, order, scratch)]
        launches += [p.gemm(t, pairs, slots, order, o, scratch) for p, t, o in zip(products, tiles, outs, strict=True)]
        if apart:
            constants = {"N": last.n, "SUM": active, "BLOCK": min(power_of_two(last.n), 512)}
            added = {"pairs": end_operand, "out": Operand(out=0)}
            launches.append(launch(call, [sum_pairs_kernel], added, constants, ((tokens, 1), (last.n, constants["BLOCK"])), scratch=scratch, num_warps=2))
        found.append(Candidate(f"gemm_{'+'.join(map(str, tiles))}", tuple(launches), scratch, rank=1.0 + len(found) / 10))
    return list({c.name: c for c in found}.values())


def _multiplies(call: Call, *weights: str) -> bool:
    dtypes = {call.args[n].dtype for n in ("x", *weights)}
    return supported(call) and len(dtypes) == 1 and dtypes <= set(FLOATS) and len(call.args["x"].shape) == 2


@claims("grouped_linear", "triton")
def grouped_linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    if not _multiplies(call, "weight"):
        return []
    one = MatrixProduct.of(call, Operand(arg="x"), "weight", "bias", call.args["transposed"])
    return candidates(call, steps, target, call.args["x"].shape[0], 1, [one])


@claims("moe", "triton")
def moe(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    if not _multiplies(call, "w_in", "w_out"):
        return []
    args, (tokens, active) = call.args, call.args["expert_ids"].shape
    first = MatrixProduct.of(call, Operand(arg="x"), "w_in", "b_in", args["transposed"], shared=active, gated=args["gated"],
                        interleaved=args["interleaved"], act=args["act"])  # fmt: skip
    second = MatrixProduct.of(call, Operand(scratch=0), "w_out", "b_out", args["transposed"], scale="expert_weights")
    return candidates(call, steps, target, tokens, active, [first, second])
