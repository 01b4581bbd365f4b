"""Products with weights: a GEMV for one row, a tiled GEMM for more, both with the epilogues of linear_add and linear_glu.

Weights [N, K] are read once from memory however few rows there are, so tiles for few rows are chosen to give every
multiprocessor enough loads in flight: narrow in N, deep in K, and split over K where N alone gives too few programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from ..chain import chain
from ..dims import product
from ..kernel import Call, Candidate, Operand, Steps, Tensor, Tickets, claimants, claims
from ..target import SHARED_MEMORY_BYTES, Target
from .activations import activate, tanh
from .prefetch import prefetch_rows
from .product_tile import FINISH_TILE, early_sum, finish_tile, tile_at
from .source import FLOATS, launch, most, power_of_two, rows, supported

PROGRAMS = 132
"""How many programs fill a GPU: the multiprocessors of an H100 or H200, near enough for the others."""


@triton.jit
def gemv_kernel(x, norm_weight, weight, bias, residual, out, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                ACT: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """With EPS, x is RMS-normalized on the way: its scale is linear, so that the sum of squares is due only at the end."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, :]
    row = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k
    # the first block of the weight is on its way before x is there, and all of the norm's, which every block needs
    w = tl.load(row, mask=k < K, other=0.0)
    v = w
    if ACT is not None:
        v = tl.load(row + N * K, mask=k < K, other=0.0)
    gains = ()
    if norm_weight is not None:
        for begin in tl.static_range(0, K, BLOCK_K):
            gains += (tl.load(norm_weight + begin + k, mask=begin + k < K, other=0.0),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if residual is not None:
        added = tl.load(residual + n, mask=n < N, other=0.0)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = acc
    squares = tl.zeros([1, BLOCK_K], tl.float32)
    for begin in tl.static_range(0, K, BLOCK_K):
        if begin > 0:
            w = tl.load(row + begin, mask=begin + k < K, other=0.0)
            if ACT is not None:
                v = tl.load(row + N * K + begin, mask=begin + k < K, other=0.0)
        h = tl.load(x + begin + k, mask=begin + k < K, other=0.0).to(tl.float32)
        if EPS is not None:
            squares += h * h
            if norm_weight is not None:
                h *= gains[begin // BLOCK_K].to(tl.float32) + OFFSET
        acc += w.to(tl.float32) * h
        if ACT is not None:
            up += v.to(tl.float32) * h
    h = tl.sum(acc, 1)
    if EPS is not None:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + EPS)
        h *= scale
    if ACT is not None:
        u = tl.sum(up, 1)
        if EPS is not None:
            u *= scale
        h = activate(h, ACT) * u
    if bias is not None:
        h += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if residual is not None:
        h += added.to(tl.float32)
    tl.store(out + n, h.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def gemm_kernel(x, weight, bias, residual, out, partial, tickets, num_rows, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr, HEIGHT: tl.constexpr, SPLIT: tl.constexpr, ACT: tl.constexpr, PREFETCH: tl.constexpr,
                THREADS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """PREFETCH: bytes of each row of the weight to ask for while the predecessor ends. With SPLIT > 1 a program multiplies a part of K."""
    first_n, first_m = tile_at(BLOCK_N, BLOCK_M, HEIGHT)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    depth: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    a = x + tl.minimum(m, num_rows - 1).to(tl.int64)[:, None] * K + k[None, :]
    row = weight + tl.minimum(n, N - 1).to(tl.int64) * K
    b = row[None, :] + k[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch_rows(row + split * depth, BLOCK_N, PREFETCH, THREADS)
            if ACT is not None:
                prefetch_rows(row + N * K + split * depth, BLOCK_N, PREFETCH, THREADS)
        tl.extra.cuda.gdc_wait()
    EARLY: tl.constexpr = residual is not None and ACT is None and BLOCK_M * BLOCK_N <= 16 * THREADS
    if EARLY:
        added = early_sum(residual, m[:, None], n[None, :], num_rows, N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = acc
    for step in range(0, depth, BLOCK_K):
        begin = split * depth + step
        if K % (SPLIT * BLOCK_K) == 0:
            h = tl.load(a + begin)
            w = tl.load(b + begin)
            if ACT is not None:
                v = tl.load(b + N * K + begin)
        else:
            h = tl.load(a + begin, mask=(begin + k < K)[None, :], other=0.0)
            w = tl.load(b + begin, mask=(begin + k < K)[:, None], other=0.0)
            if ACT is not None:
                v = tl.load(b + N * K + begin, mask=(begin + k < K)[:, None], other=0.0)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
        if ACT is not None:
            up = tl.dot(h, v, up, input_precision=PRECISION)
    if EARLY:
        acc += added.to(tl.float32)
    finish_tile(acc, up, bias, None if EARLY else residual, out, partial, tickets, m[:, None], n[None, :], num_rows, N, SPLIT, ACT)


@dataclass(frozen=True)
class Tile:
    """Of a GEMM: block sizes, warps, pipeline stages, splits of K."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int = 1

    def __str__(self) -> str:
        return f"m{self.m}_n{self.n}_k{self.k}_w{self.warps}_s{self.stages}" + (f"_split{self.split}" if self.split > 1 else "")

    def shared_bytes(self, itemsize: int, weights: int) -> int:
        return self.stages * (self.m + weights * self.n) * self.k * itemsize


# best first where the weight is narrow, last where it is very wide (an LM head); of up to 16 and 64 rows by benchmarks/gpu_tiles.py
# rows of the weight, columns, warps
GEMV_TILES: tuple[tuple[int, int, int], ...] = (
    (4, 1024, 4), (2, 2048, 8), (4, 1024, 2), (2, 4096, 4), (4, 2048, 8), (4, 4096, 8), (8, 1024, 4),
)  # fmt: skip
FEW_ROWS: tuple[Tile, ...] = (Tile(16, 16, 256, 4, 6), Tile(16, 32, 256, 4, 6), Tile(16, 64, 128, 4, 8), Tile(16, 32, 128, 4, 8), Tile(16, 64, 256, 4, 4))
MORE_ROWS = (Tile(32, 32, 256, 4, 6), Tile(32, 32, 128, 4, 8), Tile(32, 16, 256, 4, 6), Tile(32, 64, 128, 4, 6), Tile(32, 64, 256, 4, 4))
SOME_ROWS: tuple[Tile, ...] = (
    Tile(64, 32, 128, 4, 6),
    Tile(64, 32, 256, 4, 4),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 64, 64, 4, 8),
    Tile(64, 64, 256, 4, 3),
    Tile(64, 16, 128, 4, 6),
)
A_BATCH = (Tile(64, 64, 128, 4, 4), Tile(64, 32, 128, 4, 6), Tile(128, 64, 128, 4, 4), Tile(64, 128, 128, 4, 4), Tile(128, 128, 64, 8, 4))
MANY_ROWS = (Tile(128, 128, 64, 8, 4), Tile(64, 128, 128, 4, 4), Tile(128, 64, 128, 4, 4), Tile(128, 256, 64, 8, 3))
EXACT = (Tile(16, 32, 32, 4, 3), Tile(64, 64, 16, 4, 3))  # float32: multiplied without the matrix units' rounding
WIDE = 256 * PROGRAMS
PREFETCHED = (8 << 10, 32 << 10)
"""Weights that a program asks for ahead, at least and at most: in between, a quarter of what it reads. To ask for much more takes longer than it spares."""


def fitted(tiles: Sequence[Tile], dtype: torch.dtype, weights: int, width: int, depth: int, target: Target) -> list[Tile]:
    """Those that, cut to a product's width and depth and with as many stages as there is room for, fit in shared memory."""
    found = []
    for t in tiles:
        # two weights double the accumulator and the traffic of a tile: halve its width
        t = replace(t, n=min(max(t.n // weights, 16), max(16, power_of_two(width))), k=min(t.k, max(16, power_of_two(depth))))
        stages = min(t.stages, SHARED_MEMORY_BYTES[target.isa] // replace(t, stages=1).shared_bytes(dtype.itemsize, weights))
        if stages >= 2:
            found.append(replace(t, stages=stages))
    return list(dict.fromkeys(found))


def _tiles(call: Call, steps: Steps, target: Target, width: int, depth: int) -> list[Tile]:
    """Tiles that fit in shared memory, best first."""
    x = call.args["x"]
    most_rows = most(rows(x), steps)
    weights = 2 if "act" in call.args else 1
    if x.dtype == torch.float32:
        return list(EXACT[:1] if most_rows <= 16 else EXACT)
    # of deterministic steps one tile serves all: one that still streams the weight when rows are few
    by_rows = ((16, FEW_ROWS), (32, MORE_ROWS), (64, SOME_ROWS), (256, A_BATCH))
    wanted = next((tiles for limit, tiles in by_rows if most_rows <= limit), SOME_ROWS if steps.deterministic else MANY_ROWS)
    tiles = fitted(wanted, x.dtype, weights, width, depth, target)
    if width >= WIDE:
        return tiles[::-1]
    if most_rows > 256:
        return tiles
    programs = [-(-most_rows // t.m) * -(-width // t.n) for t in tiles]
    most_splits = [split_of(p, depth // t.k, 2 * PROGRAMS) for t, p in zip(tiles[:4], programs, strict=False)]
    apart = [replace(t, split=s) for t, most in zip(tiles, most_splits, strict=False) for s in (most, most // 2) if s > 1]
    return apart + tiles if programs[0] <= PROGRAMS // 2 else tiles + apart


def split_of(programs: int, blocks: int, enough: int) -> int:
    """Parts of K that make `programs` up to `enough`, each with two blocks of K at least."""
    return max((s for s in (2, 4, 8) if programs * s <= enough and blocks >= 2 * s), default=1)


def prefetched(depth: int, bits: int, split: int, block_n: int, block_k: int, alone: bool) -> int:
    """Bytes of each row's part to ask for ahead, fewer where one row of x is `alone`; none where parts are no multiples of 16 bytes, or the last would reach
    beyond its row."""
    if depth * bits % (128 * split) or (split > 1 and depth % (split * block_k)):
        return 0
    part, (least, most) = depth // split, PREFETCHED
    wanted = max(least, min(block_n * part // 4, most // 2 if alone else most))
    return min(part, wanted // block_n // 32 * 32) * bits // 8


def _gemv(call: Call) -> list[Candidate]:
    width, depth, glu = _width(call), call.args["weight"].shape[1], "act" in call.args
    names = ("x", "norm_weight", "weight", "bias", "residual")
    operands = {p: Operand(arg=p) for p in names if p in call.args} | {"out": Operand(out=0)}
    constants: dict[str, object] = {p: None for p in names if p not in call.args}
    constants |= {"N": width, "K": depth, "ACT": call.args.get("act"), "EPS": call.args.get("eps"), "OFFSET": call.args.get("offset")}
    found = []
    for rank, (block_n, block_k, warps) in enumerate(GEMV_TILES if width < WIDE else GEMV_TILES[::-1]):
        block_n, block_k = block_n // 2 if glu else block_n, min(block_k, power_of_two(depth))
        blocks = constants | {"BLOCK_N": block_n, "BLOCK_K": block_k}
        one = launch(call, [gemv_kernel, activate, tanh], operands, blocks, ((width, block_n),), num_warps=warps)
        found.append(Candidate(f"gemv_n{block_n}_k{block_k}_w{warps}", (one,), rank=rank / 10))
    return list({c.name: c for c in found}.values())


def _gemm(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    x, width, depth = call.args["x"], _width(call), call.args["weight"].shape[1]
    count = rows(x)
    inputs = {p: Operand(arg=p) for p in ("x", "weight", "bias", "residual") if p in call.args} | {"out": Operand(out=0)}
    num_rows = {"num_rows": Operand(size=count)}
    found = []
    for i, t in enumerate(_tiles(call, steps, target, width, depth)):
        ahead = prefetched(depth, 8 * x.dtype.itemsize, t.split, t.n, t.k, most(count, steps) == 1) if t.m <= 64 else 0
        scratch: tuple[Tensor, ...] = ()
        shared: dict[str, Operand] = {}
        if t.split > 1:
            tiles = -(-most(count, steps) // t.m) * -(-width // t.n)
            sums = t.split * (2 if "act" in call.args else 1)
            scratch = (Tensor(torch.float32, (product(count, sums), width)), Tickets(torch.int32, (tiles,)))
            shared = {"partial": Operand(scratch=0), "tickets": Operand(scratch=1)}
        constants = {"N": width, "K": depth, "ACT": call.args.get("act"), "BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_K": t.k, "HEIGHT": 8, "SPLIT": t.split,
                     "PREFETCH": ahead, "THREADS": 32 * t.warps, "PRECISION": "ieee" if x.dtype == torch.float32 else None}  # fmt: skip
        constants |= {p: None for p in ("bias", "residual", "partial", "tickets") if p not in inputs | shared}
        functions, grid = [gemm_kernel, tile_at, *FINISH_TILE, early_sum, prefetch_rows], ((count, t.m), (width, t.n), (t.split, 1))
        one = launch(call, functions, inputs | shared | num_rows, constants, grid, scratch=scratch, num_warps=t.warps, num_stages=t.stages)
        found.append(Candidate(f"gemm_{t}", (one,), scratch, rank=i / 10 if most(count, steps) <= 64 else 1.0 + i))
    return found


def _width(call: Call) -> int:
    """Columns of the result."""
    wide: int = call.args["weight"].shape[0]
    return wide // 2 if "act" in call.args else wide


def _multiplies(call: Call) -> bool:
    return supported(call) and call.args["x"].dtype == call.args["weight"].dtype and call.args["x"].dtype in FLOATS


@claims("linear", "triton")
@claims("linear_add", "triton")
@claims("linear_glu", "triton")
def linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    if not _multiplies(call):
        return []
    return _gemv(call) if most(rows(call.args["x"]), steps) == 1 else _gemm(call, steps, target)


@claims("rms_norm_linear", "triton")
@claims("rms_norm_linear_glu", "triton")
def normalizing(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """An RMSNorm, then every way to multiply; of one row also in one kernel, where the norm is free in the shadow of the weight.

    Of more rows two launches are faster. Where each program normalizes the rows again, at 16 rows and at 64 (benchmarks/gpu_tiles.py); where the
    norm's weight is folded into the product's and only the sum of squares is left, up to 32 rows, and then a step of 64 rows gains 1 to 3% (H100).
    """
    x = call.args["x"]
    norm = Call("rms_norm", {"x": x, "weight": call.args["norm_weight"], "eps": call.args["eps"], "offset": call.args["offset"]}, (x,))
    rest = {n: a for n, a in call.args.items() if n not in ("norm_weight", "eps", "offset")}
    tails = claimants(Call(call.op.removeprefix("rms_norm_"), rest, call.results), steps, target)
    fused = _gemv(call) if _multiplies(call) and most(rows(x), steps) == 1 else []
    return fused + [chain(head, x, "x", tail, {"weight": "norm_weight"}) for head in claimants(norm, steps, target)[:1] for tail in tails]
