"""Quantized weights as 16-bit floats: in registers, as the matrix units take them, or as a whole, for the library's product.

4-bit codes are put under the exponent of 128 (bfloat16) or 1024 (float16), two in two instructions, and that is taken from them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..chain import chain
from ..kernel import Call, Candidate, Operand, Tensor, claimants
from .quantized_product import CHUNK, Product, begin_of, word_of
from .source import launch

LARGEST_SCRATCH = 1 << 30
"""Bytes that a weight may take when it is dequantized as a whole."""
MAGIC = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400}
"""Twice the bits of 128 and 1024. Kernels get them at run time: an instruction has room for one constant, the mask, and so masks and sets at once."""


@triton.jit
def register_rows(BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """The order [BLOCK_N] in which `widen_nibbles` wants rows: what a warp loads is then what it multiplies, and nothing is exchanged."""
    AT_ONCE: tl.constexpr = min(WARPS, BLOCK_N // 16)
    i = tl.arange(0, BLOCK_N)
    return i % 8 + i // (8 * AT_ONCE) % 2 * 8 + i // 8 % AT_ONCE * 16 + i // (16 * AT_ONCE) * (16 * AT_ONCE)


@triton.jit
def nibble_pairs(words, away, scale, magic, Q: tl.constexpr, dtype: tl.constexpr):
    """Nibbles Q and Q + 4 of words [...] → [..., 2]: less `away`, times `scale` if there is one."""
    both = ((words >> (4 * Q)) & 0x000F000F) | magic
    low = both.to(tl.int16).to(dtype, bitcast=True) - away
    high = (both >> 16).to(tl.int16).to(dtype, bitcast=True) - away
    if scale is not None:
        low *= scale
        high *= scale
    return tl.join(low, high)


@triton.jit
def widen_nibbles(words, zero, scale, magic, dtype: tl.constexpr, MIDDLE: tl.constexpr, WARPS: tl.constexpr):
    """(codes − zero) · scale [N, 128 C] in `dtype` (bfloat16, float16), rows in their order, of words [N, 16 C] (layout "panels" of
    `formats.integer`), rows in that of `register_rows(N, WARPS)`.

    zero, scale: [N, P] in `dtype`, rows like those of the words: each of P equal runs of columns, of at least 32, has its own. Without a scale it is 1 and
    the result exact, without zeros they are MIDDLE. magic: MAGIC[dtype]. N: a multiple of 16; if it is one of 16 · WARPS, the result is laid out as wgmma
    takes its left operand from registers.
    """
    N: tl.constexpr = words.shape[0]
    CHUNKS: tl.constexpr = words.shape[1] // 16
    BASE: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    PARTS: tl.constexpr = zero.shape[1] if zero is not None else scale.shape[1] if scale is not None else 1
    RUNS: tl.constexpr = max(PARTS // CHUNKS, 1)  # of a chunk
    w = tl.reshape(words, [N, CHUNKS, 4, RUNS, 4 // RUNS])
    if zero is not None:
        away = tl.reshape((BASE + zero.to(tl.float32)).to(dtype), [N, min(PARTS, CHUNKS), 1, RUNS, 1])
    else:
        away = (tl.zeros([], tl.float32) + (BASE + MIDDLE)).to(dtype)
    if scale is not None:
        scale = tl.reshape(scale, [N, min(PARTS, CHUNKS), 1, RUNS, 1])
    even = tl.join(nibble_pairs(w, away, scale, magic, 0, dtype), nibble_pairs(w, away, scale, magic, 2, dtype))
    odd = tl.join(nibble_pairs(w, away, scale, magic, 1, dtype), nibble_pairs(w, away, scale, magic, 3, dtype))
    # n, chunk, t, j (two dims), h, bits 1 and 0 of q → n, chunk, j, q, t, h
    columns = tl.reshape(tl.permute(tl.join(even, odd), (0, 1, 3, 4, 6, 7, 2, 5)), [N, CHUNKS * 128])
    AT_ONCE: tl.constexpr = min(WARPS, N // 16)
    halves = tl.reshape(columns, [N // (16 * AT_ONCE), 2, AT_ONCE, 8, CHUNKS * 128])
    return tl.reshape(tl.permute(halves, (0, 2, 1, 3, 4)), [N, CHUNKS * 128])


@triton.jit
def widen_bytes(codes, zero, scale, dtype: tl.constexpr, MIDDLE: tl.constexpr):
    """(codes − zero) · scale in `dtype` of 8-bit codes [N, K], which int8 keeps less MIDDLE; zero, scale: [N, 1] or None."""
    if zero is not None:
        codes = codes.to(tl.float32) + (MIDDLE - zero.to(tl.float32))
    if scale is not None:
        return (codes.to(tl.float32) * scale.to(tl.float32)).to(dtype)
    if codes.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        codes = codes.to(tl.float32)  # which are two in an instruction; directly, each takes a slow one
    return codes.to(dtype)


@triton.jit
def runs_of(row, begin, EACH: tl.constexpr, COUNT: tl.constexpr, RUNS: tl.constexpr, PANEL: tl.constexpr):
    """Scales or zeros [N, RUNS] of the columns from `begin` on, at pointers row [N] to those of COUNT runs of EACH columns, each PANEL behind the last."""
    if RUNS == 1:  # in one dimension, so that no layout of theirs stands against that of the codes
        return tl.load(row + tl.minimum(begin // EACH, COUNT - 1) * PANEL)[:, None]
    else:
        return tl.load(row[:, None] + tl.minimum(begin // EACH + tl.arange(0, RUNS), COUNT - 1)[None, :] * PANEL)


@triton.jit
def dequantize_kernel(weight, scale, zero, out, magic, N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                      SCALES: tl.constexpr, SCALE_ROWS: tl.constexpr, MIDDLE: tl.constexpr, PANEL: tl.constexpr, BLOCK_N: tl.constexpr,
                      WARPS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program makes 128 columns of BLOCK_N rows of the weight [N, K]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    dtype: tl.constexpr = out.dtype.element_ty
    begin = tl.program_id(1) * 128
    EACH: tl.constexpr = GROUP if GROUP > 0 else 128  # of one scale, all is the last run
    RUNS: tl.constexpr = max(128 // EACH, 1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.program_id(0) * BLOCK_N + (register_rows(BLOCK_N, WARPS) if BITS == 4 else tl.arange(0, BLOCK_N))
    held = tl.minimum(held, N - 1).to(tl.int64)
    s = runs_of(scale + begin_of(held // SCALE_ROWS, SCALES, 1, PANEL), begin, EACH, SCALES, RUNS, PANEL)
    z = None
    if zero is not None:
        z = runs_of(zero + begin_of(held, SCALES, 1, PANEL), begin, EACH, SCALES, RUNS, PANEL)
    if BITS == 4:
        words = tl.load((weight + begin_of(held, WORDS, 16, PANEL))[:, None] + word_of(begin, 16, PANEL)[None, :])
        h = widen_nibbles(words, z, s, magic, dtype, MIDDLE, WARPS)
    else:
        k = begin + tl.arange(0, 128)[None, :]
        codes = tl.load((weight + held * WORDS)[:, None] + k, mask=k < K, other=0.0)
        h = widen_bytes(tl.reshape(codes, [BLOCK_N * RUNS, 128 // RUNS]), None if z is None else tl.reshape(z, [BLOCK_N * RUNS, 1]),
                        tl.reshape(s, [BLOCK_N * RUNS, 1]), dtype, MIDDLE)  # fmt: skip
        h = tl.reshape(h, [BLOCK_N, 128])
    if PDL:
        tl.extra.cuda.gdc_wait()  # whoever reads what lies there now
    k = begin + tl.arange(0, 128)
    tl.store(out + rows.to(tl.int64)[:, None] * K + k[None, :], h, mask=(k < K)[None, :] & (rows < N)[:, None])


def dequantized(product: Product) -> list[Candidate]:
    """The weight in the type of x, made anew in each step, then the library's product: what it costs is little beside a product with many rows."""
    args, x, n, k = product.call.args, product.x, product.call.args["n"], product.k
    if n * k * x.dtype.itemsize > LARGEST_SCRATCH or (product.act and args["bias"] is not None):
        return []
    plain = Tensor(x.dtype, (n, k))
    blocks = product.constants("X_GROUP", "ACT") | {"N": n, "BLOCK_N": 64, "WARPS": 4}
    operands = {p: Operand(arg=p) for p in ("weight", "scale", "zero")} | {"out": Operand(out=0), "magic": Operand(const=MAGIC[x.dtype])}
    functions = [dequantize_kernel, begin_of, word_of, widen_nibbles, nibble_pairs, register_rows, widen_bytes, runs_of]
    head = Candidate("dequantize", (launch(Call("dequantize", args, (plain,)), functions, operands, blocks, ((n, 64), (k, CHUNK)), num_warps=4),))
    rest = {"act": product.act} if product.act else {"bias": args["bias"]} | ({"residual": args["residual"]} if args["residual"] is not None else {})
    op = "linear_glu" if product.act else "linear" if args["residual"] is None else "linear_add"
    tails = claimants(Call(op, {"x": x, "weight": plain, **rest}, product.call.results), product.steps, product.target)
    rank = 0.05 if product.steps.max_tokens <= 512 else -1.0
    return [replace(chain(head, plain, "weight", tail), rank=rank) for tail in tails if tail.name.startswith("library")]
