"""What the GEMMs with quantized weights share. Their tiles are weight · xᵀ: the weight is the matrix units' left side, which may come from registers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton import JITFunction

from ..dims import product as product_of
from ..kernel import Candidate, Launch, Operand, Tensor, Tickets
from ..target import SHARED_MEMORY_BYTES, Target
from .linear import PROGRAMS, prefetched, split_of
from .prefetch import prefetch_rows
from .product_tile import FINISH_TILE, early_sum, tile_at
from .quantized_product import CHUNK, Product, Weights
from .source import launch, power_of_two

MAX_STAGES = 8


@dataclass(frozen=True)
class Tile:
    """Rows of the weight, rows of x, columns; warps, pipeline stages; how many blocks of columns a stage has; splits of K."""

    n: int
    m: int
    k: int
    warps: int
    stages: int
    unroll: int = 1
    split: int = 1

    def __str__(self) -> str:
        more = [f"_{what}{n}" for what, n in (("u", self.unroll), ("split", self.split)) if n > 1]
        return f"n{self.n}_m{self.m}_k{self.k}_w{self.warps}_s{self.stages}" + "".join(more)


@dataclass(frozen=True)
class Tiles:
    """Of a kernel, best first: for 16 rows of x, 64 and more, and the last two for gated products, whose tile has two weights."""

    few: tuple[Tile, ...]
    some: tuple[Tile, ...]
    many: tuple[Tile, ...]
    gated_some: tuple[Tile, ...]
    gated_many: tuple[Tile, ...]

    def of(self, rows: int, gated: bool, deterministic: bool) -> tuple[Tile, ...]:
        """Those for up to so many rows of x."""
        if rows <= 16:
            return self.few
        if rows <= 64 or deterministic:  # one tile serves all of those: one that still streams the weight when rows are few
            return self.gated_some if gated else self.some
        return self.gated_many if gated else self.many


def fitting(wanted: Sequence[Tile], weights: Weights, pieces: int, width: int, k: int, dtype: torch.dtype, target: Target, x_group: int = 0) -> list[Tile]:
    """Those that fit in shared memory, as the groups and sizes of a product let them be. `dtype`: of x as it is multiplied; `pieces`: weights side by side."""
    widens = dtype.itemsize > 1
    found = []
    for t in wanted:
        depth = CHUNK if weights.bits == 4 else x_group or weights.group or max(32, min(t.k, power_of_two(k)))
        n = min(t.n, max(32, power_of_two(width)))
        stage = t.unroll * depth * (pieces * n * weights.bits // 8 + t.m * dtype.itemsize)
        # without wgmma, widened weights go through shared memory to become the left operand
        widened = n * depth * dtype.itemsize if widens and target.arch != 90 else 0
        stages = min(t.stages * max(1, t.k // depth), (SHARED_MEMORY_BYTES[target.isa] - widened) // stage, MAX_STAGES)
        if stages >= 2:
            found.append(replace(t, n=n, k=depth, stages=stages))
    return list(dict.fromkeys(found))


def tiles(product: Product, wanted: Tiles) -> list[Tile]:
    """Those that fit, best first, and with few rows some that split K."""
    gated = product.act is not None
    found = fitting(wanted.of(product.rows, gated, product.steps.deterministic), product.weights, 2 if gated else 1, product.width, product.k,
                    product.codes or product.x.dtype, product.target, product.x_group)  # fmt: skip
    if product.rows > 256:
        return found
    apart = []
    enough = PROGRAMS if product.rows > 64 else 3 * PROGRAMS  # what splits cost grows with the rows
    for t in found[:3]:
        programs = -(-product.rows // t.m) * -(-product.width // t.n)
        split = split_of(programs, product.k // t.k, enough)
        apart += [replace(t, split=split)] if split > 1 else []
    return apart + found if -(-product.width // found[0].n) <= PROGRAMS else found + apart


Parts = tuple[dict[str, Operand], dict[str, None], tuple[Tensor, ...]]


def parts_of_sums(product: Product, split: int, tickets: int, scratch: tuple[Tensor, ...] = ()) -> Parts:
    """What `finish_tile` needs where `split` programs have parts of a sum: operands, constants that stand for them if there is one, and scratch behind that
    which there is."""
    if split == 1:
        return {}, {"partial": None, "tickets": None}, scratch
    size = product_of(product.tokens, split * (2 if product.act else 1))
    operands = {"partial": Operand(scratch=len(scratch)), "tickets": Operand(scratch=len(scratch) + 1)}
    return operands, {}, (*scratch, Tensor(torch.float32, (size, product.width)), Tickets(torch.int32, (tickets,)))


def gemm(product: Product, functions: Sequence[JITFunction], operands: Mapping[str, Operand], constants: Mapping[str, Any], t: Tile,
         before: tuple[Launch, ...] = (), scratch: tuple[Tensor, ...] = ()) -> Candidate:  # fmt: skip
    """The candidate of a tile: the launches `before`, which leave `scratch`, and one of the first of `functions`."""
    tokens, width = product.tokens, product.width
    blocks = {"BLOCK_N": t.n, "BLOCK_M": t.m, "BLOCK_K": t.k, "HEIGHT": 8, "SPLIT": t.split, "THREADS": 32 * t.warps,
              "PREFETCH": prefetched(product.k, product.weights.bits, t.split, t.n, t.k, product.rows == 1) if t.m <= 64 else 0, **constants}  # fmt: skip
    parts, absent, scratch = parts_of_sums(product, t.split, -(-product.rows // t.m) * -(-width // t.n), scratch)
    operands = {**operands, "bias": Operand(arg="bias"), "residual": Operand(arg="residual"), "out": Operand(out=0), **parts, "num_rows": Operand(size=tokens)}
    one = launch(product.call, [*functions, tile_at, *FINISH_TILE, early_sum, prefetch_rows], operands, blocks | absent,
                 ((tokens, t.m), (width, t.n), (t.split, 1)), scratch=scratch, num_warps=t.warps, num_stages=t.stages)  # fmt: skip
    return Candidate(f"gemm_{t}", (*before, one), scratch)
