"""FP8 products of 65 to 256 rows: which tiles are fastest, and whether gate and up should be one product. Every tile of a grid, at the shapes of llama-3.1-8b.

    python benchmarks/gpu_codes.py [--rows 128,256] [--only gate_up] [-o FILE.json]

There neither memory nor the matrix units decide alone: of 256 rows gate and up take 59 µs, their weight 38 and their sums 30. A warpgroup's product of 64 rows
of a weight with 128 of x reads 6 KB of shared memory in 64 cycles, 96 bytes in each, and another 48 arrive: more than the 128 that there are. With
256 rows of x it is 80. So a tile should be 128 × 256 where that gives programs enough, by splitting K if need be; and of a gated product, whose tile has two
weights, `paired_gemm_kernel` makes one of 128 rows instead of two of 64.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import torch
import triton
import triton.language as tl
from gpu_kernels import here
from gpu_quantized import products
from gpu_tiles import timed

import ingot.ops.library  # noqa: F401  (a claimant too)
from ingot.ops import triton as families
from ingot.ops.kernel import Candidate, claimants
from ingot.ops.triton.activations import activate
from ingot.ops.triton.linear import PROGRAMS
from ingot.ops.triton.prefetch import prefetch_rows
from ingot.ops.triton.product_tile import finish_tile, tile_at
from ingot.ops.triton.quantized_gemm import Tile, fitting
from ingot.ops.triton.quantized_product import Product
from ingot.ops.triton.scaled_gemm import multiply_codes, of_tiles, scaled_gemm_kernel

GRID = tuple(Tile(n, m, k, w, 8) for n, m, k, w in itertools.product((64, 128, 256), (64, 128, 256), (128, 256), (4, 8)))
SPLITS = (2, 3, 4, 8)


@triton.jit
def paired_gemm_kernel(x, x_scale, weight, scale, bias, residual, out, partial, tickets, num_rows, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                       SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr, X_GROUP: tl.constexpr, X_SCALES: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, HEIGHT: tl.constexpr, SPLIT: tl.constexpr, ACT: tl.constexpr, THREADS: tl.constexpr,
                       PREFETCH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """`scaled_gemm_kernel` of a gated product whose K is a multiple of BLOCK_K, with scales of whole rows, as one product of 2 · BLOCK_N rows of the weight: of
    each 16 that a warp has, 8 are gate's and the next 8 up's, so that a thread has both of a column when they meet."""
    first_n, first_m = tile_at(BLOCK_N, BLOCK_M, HEIGHT)
    i = tl.arange(0, 2 * BLOCK_N)
    m = first_m + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    both = tl.minimum(first_n + i // 16 * 8 + i % 8, N - 1) + i % 16 // 8 * N
    row = weight + both.to(tl.int64) * K
    by = tl.load(scale + both)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch_rows(row, 2 * BLOCK_N, PREFETCH, THREADS)
        tl.extra.cuda.gdc_wait()
    token = tl.minimum(m, num_rows - 1).to(tl.int64)
    x_by = tl.load(x_scale + token)
    w_row = row[:, None] + k[None, :]
    x_row = x + token[None, :] * K + k[:, None]
    acc = tl.zeros([2 * BLOCK_N, BLOCK_M], tl.float32)
    for begin in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(w_row + begin), tl.load(x_row + begin), acc)
    acc *= by.to(tl.float32)[:, None] * x_by[None, :]
    h, u = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N // 8, 2, 8, BLOCK_M]), (0, 2, 3, 1)))
    h = tl.reshape(activate(h, ACT) * u, [BLOCK_N, BLOCK_M])
    n = first_n + tl.arange(0, BLOCK_N)
    finish_tile(h, h, bias, residual, out, partial, tickets, m[None, :], n[:, None], num_rows, N, SPLIT, None)


def paired(product: Product) -> list[Candidate]:
    """Those of a gated product."""
    if product.act is None:
        return []
    return [replace(c, name=f"paired_{c.name}") for c in of_tiles(product, grid(product), [paired_gemm_kernel])]


def grid(product: Product) -> list[Tile]:
    """Tiles whose sums are a good part of the registers, with three stages or more."""
    weights = 2 if product.act else 1
    wanted = [t for t in GRID if 32 <= weights * t.n * t.m // (32 * t.warps) <= 128]
    found = fitting(wanted, product.weights, weights, product.width, product.k, torch.float8_e4m3fn, product.target)
    return [t for t in found if t.stages >= 3]


def split(product: Product) -> list[Candidate]:
    """`scaled_gemms` with every tile, whole and in as many parts of K as give each multiprocessor up to two programs."""
    tiles: list[Tile] = []
    for t in grid(product):
        programs = -(-product.rows // t.m) * -(-product.width // t.n)
        tiles += [t, *(replace(t, split=s) for s in SPLITS if PROGRAMS // 2 <= programs * s <= 2 * PROGRAMS and product.k >= 4 * s * t.k)]
    return of_tiles(product, tiles, [scaled_gemm_kernel, multiply_codes])


def candidates(product: Product) -> list[Candidate]:
    """Those that a plan may take today come first."""
    today = claimants(product.call, product.steps, product.target)
    return list({c.name: c for c in (*today, *split(product), *paired(product))}.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="128,256")
    parser.add_argument("--only", default="qkv,o,gate_up,down")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    families.load()
    target, todo = here(), []
    for problem, call, steps, *_ in (p for rows in map(int, args.rows.split(",")) for p in products("fp8", rows)):
        product = Product.of(call, steps, target)
        assert product is not None
        todo += [(problem, call, steps, candidates(product))] if problem.split()[1] in args.only.split(",") else []
    results = {}
    for name, _, times in timed(todo, target):
        results[name] = times
        print(f"{name:16} " + "  ".join(f"{n} {t}" for n, t in list(times.items())[:6]), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "us": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
