"""Products of each head with a weight of its own: of latent attention, what takes queries into the space of latents and results out of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..kernel import Call, Candidate, Operand, Steps, claims
from ..target import Target
from .prefetch import prefetch_rows
from .source import FLOATS, launch, most, power_of_two, supported


@triton.jit
def head_linear_kernel(x, weight, out, num_tokens, H: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr, THREADS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """PREFETCH: whether to ask for the first block of the weight while the predecessor ends."""
    head = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = weight + (head * N + tl.minimum(n, N - 1)) * K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH:
            prefetch_rows(row, BLOCK_N, BLOCK_K * weight.dtype.element_ty.primitive_bitwidth // 8, THREADS)
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    a = x + (tl.minimum(m, num_tokens - 1).to(tl.int64) * H + head)[:, None] * K + k[None, :]
    b = row[None, :] + k[:, None]
    for begin in range(0, K, BLOCK_K):
        inside = begin + k < K
        h = tl.load(a + begin, mask=inside[None, :], other=0.0)
        w = tl.load(b + begin, mask=inside[:, None], other=0.0)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
    at = (m.to(tl.int64) * H + head)[:, None] * N + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(m < num_tokens)[:, None] & (n < N)[None, :])


# output columns, depth, warps, stages, by the most tokens: few stream the weights, many are multiplied from shared memory
HEAD_TILES = {16: ((32, 128, 4, 3), (64, 128, 4, 3), (16, 256, 4, 3)), 64: ((64, 64, 4, 3), (128, 64, 4, 3)), 128: ((128, 64, 8, 3), (64, 64, 4, 3))}


@claims("head_linear", "triton")
def head_linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    x, weight = call.args["x"], call.args["weight"]
    if not supported(call) or x.dtype not in FLOATS or x.dtype != weight.dtype:
        return []
    tokens, heads, depth = x.shape
    width = weight.shape[1]
    few = most(tokens, steps) <= 16
    block_m = 16 if few or x.dtype == torch.float32 else 64 if most(tokens, steps) <= 64 or steps.deterministic else 128
    operands = {"x": Operand(arg="x"), "weight": Operand(arg="weight"), "out": Operand(out=0), "num_tokens": Operand(size=tokens)}
    found: dict[str, Candidate] = {}
    for rank, (n, k, warps, stages) in enumerate(HEAD_TILES[block_m]):
        block_n, block_k = (max(16, min(size, power_of_two(whole))) for size, whole in ((n, width), (k, depth)))
        if x.dtype == torch.float32:
            block_n, block_k = min(block_n, 32), min(block_k, 32)
        ahead = few and depth >= block_k and depth * x.dtype.itemsize % 16 == 0
        constants = {"H": heads, "N": width, "K": depth, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
                     "PREFETCH": ahead, "THREADS": 32 * warps, "PRECISION": "ieee" if x.dtype == torch.float32 else None}  # fmt: skip
        one = launch(call, [head_linear_kernel, prefetch_rows], operands, constants, ((tokens, block_m), (width, block_n), (heads, 1)),
                     num_warps=warps, num_stages=stages)  # fmt: skip
        name = f"m{block_m}_n{block_n}_k{block_k}_w{warps}_s{stages}"
        found.setdefault(name, Candidate(name, (one,), rank=rank))
    return list(found.values())
