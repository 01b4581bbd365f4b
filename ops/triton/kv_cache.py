"""New keys and values into their pages, alone or together with what comes before it: head norms and rotation."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..kernel import Call, Candidate, Operand, Steps, claims
from ..quantize import LARGEST
from ..target import Target
from .quantize import row_scale, to_eight_bits
from .rotary import rotation, style_constants
from .source import launch, power_of_two, supported


@triton.jit
def write_head(h, there, col, cache, scale, static, row, head, WIDTH: tl.constexpr, STATIC: tl.constexpr, LARGEST: tl.constexpr):
    """h [heads, dims] to rows [heads, 1] of a cache that are `there`, quantized if it has scales; dims beyond WIDTH are 0."""
    if scale is not None:
        if static is not None:
            by = tl.load(static + (head if STATIC > 1 else head * 0))
        else:
            by = row_scale(h, LARGEST)
        tl.store(scale + row, by, mask=there)
        h = to_eight_bits(h, by, cache.dtype.element_ty, LARGEST)
    tl.store(cache + row * WIDTH + col, h.to(cache.dtype.element_ty), mask=there & (col < WIDTH))


@triton.jit
def kv_write_kernel(k, v, k_cache, v_cache, k_scale, v_scale, k_static, v_static, slot_mapping, K: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
                    PAGE: tl.constexpr, STATIC: tl.constexpr, K_LARGEST: tl.constexpr, V_LARGEST: tl.constexpr, BLOCK_H: tl.constexpr,
                    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        row = (slot // PAGE * K + head) * PAGE + slot % PAGE
        inside = tl.minimum(head, K - 1)
        e = tl.arange(0, BLOCK_E)[None, :]
        new = tl.load(k + (token * K + head) * E + e, mask=(head < K) & (e < E), other=0.0).to(tl.float32)
        write_head(new, head < K, e, k_cache, k_scale, k_static, row, inside, E, STATIC, K_LARGEST)
        f = tl.arange(0, BLOCK_F)[None, :]
        new = tl.load(v + (token * K + head) * F + f, mask=(head < K) & (f < F), other=0.0).to(tl.float32)
        write_head(new, head < K, f, v_cache, v_scale, v_static, row, inside, F, STATIC, V_LARGEST)


@triton.jit
def qkv_rope_kv_write_kernel(qkv, cos, sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, k_static, v_static, slot_mapping, q, H: tl.constexpr,
                             K: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PAGE: tl.constexpr, STATIC: tl.constexpr, K_LARGEST: tl.constexpr,
                             V_LARGEST: tl.constexpr, R: tl.constexpr, TABLE: tl.constexpr, STYLE: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
                             OFFSET: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program takes a token and some of its H + 2K heads; what is a query, a key or a value is decided row by row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    j = tl.arange(0, BLOCK)
    is_q = head < H
    is_k = (head >= H) & (head < H + K)
    is_v = (head >= H + K) & (head < H + 2 * K)
    own, partner, sign, column = rotation(j, R, STYLE, HALF)
    turns = (is_q | is_k) & (j < R)[None, :]
    own = tl.where(turns, own[None, :], j[None, :])
    base = qkv + token * ((H + K) * E + K * F) + tl.where(is_v, (H + K) * E + (head - H - K) * F, head * E)
    mask = ((is_q | is_k) & (j < E)[None, :]) | (is_v & (j < F)[None, :])
    h = tl.load(base + own, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(base + partner[None, :], mask=turns, other=0.0).to(tl.float32)
    if q_weight is not None or k_weight is not None:
        rstd = tl.rsqrt(tl.sum(h * h, 1) / E + EPS)[:, None]
    if q_weight is not None:
        h *= tl.where(is_q, rstd * (tl.load(q_weight + own, mask=is_q & mask, other=0.0).to(tl.float32) + OFFSET), 1.0)
        p *= tl.where(is_q, rstd * (tl.load(q_weight + partner[None, :], mask=is_q & turns, other=0.0).to(tl.float32) + OFFSET), 1.0)
    if k_weight is not None:
        h *= tl.where(is_k, rstd * (tl.load(k_weight + own, mask=is_k & mask, other=0.0).to(tl.float32) + OFFSET), 1.0)
        p *= tl.where(is_k, rstd * (tl.load(k_weight + partner[None, :], mask=is_k & turns, other=0.0).to(tl.float32) + OFFSET), 1.0)
    c = tl.load(cos + token * TABLE + column, mask=j < R, other=1.0).to(tl.float32)[None, :]
    s = (tl.load(sin + token * TABLE + column, mask=j < R, other=0.0).to(tl.float32) * sign)[None, :]
    turned = tl.where(turns, h * c + p * s, h)
    tl.store(q + (token * H + head) * E + j[None, :], turned.to(q.dtype.element_ty), mask=is_q & mask)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    page = slot // PAGE * K
    row = (page + head - H) * PAGE + slot % PAGE
    inside = tl.minimum(tl.maximum(head - H, 0), K - 1)
    write_head(turned, is_k & (slot >= 0), j[None, :], k_cache, k_scale, k_static, row, inside, E, STATIC, K_LARGEST)
    row = (page + head - H - K) * PAGE + slot % PAGE
    inside = tl.minimum(tl.maximum(head - H - K, 0), K - 1)
    write_head(turned, is_v & (slot >= 0), j[None, :], v_cache, v_scale, v_static, row, inside, F, STATIC, V_LARGEST)


CACHES = ("k_cache", "v_cache", "k_scale", "v_scale", "k_static", "v_static")
WRITE_HEAD = [write_head, row_scale, to_eight_bits]


def scale_constants(call: Call) -> dict[str, Any]:
    """How many static scales there are, and the largest value of a quantized cache."""
    static = call.args["k_static"]
    largest = {f"{n.upper()}_LARGEST": LARGEST.get(call.args[f"{n}_cache"].dtype) for n in ("k", "v")}
    return {"STATIC": 1 if static is None else static.shape[0], **largest}


@claims("kv_write", "triton")
def kv_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    if not supported(call, target):
        return []
    tokens, heads, e = call.args["k"].shape
    f, page_size = call.args["v"].shape[2], call.args["k_cache"].shape[2]
    block_h = min(power_of_two(heads), max(1, 2048 // power_of_two(max(e, f))))
    operands = {n: Operand(arg=n) for n in ("k", "v", *CACHES, "slot_mapping")}
    constants = {"K": heads, "E": e, "F": f, "PAGE": page_size, "BLOCK_H": block_h, "BLOCK_E": power_of_two(e), "BLOCK_F": power_of_two(f)}
    constants |= scale_constants(call)
    return [Candidate(f"h{block_h}", (launch(call, [kv_write_kernel, *WRITE_HEAD], operands, constants, ((tokens, 1), (heads, block_h))),))]


@claims("qkv_rope_kv_write", "triton")
def qkv_rope_kv_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    if not supported(call, target):
        return []
    heads, kv_heads = args["num_heads"], args["num_kv_heads"]
    _, _, page_size, e = args["k_cache"].shape
    f = args["v_cache"].shape[3]
    block = power_of_two(max(e, f))
    operands = {n: Operand(arg=n) for n in ("qkv", "cos", "sin", "q_weight", "k_weight", *CACHES, "slot_mapping")} | {"q": Operand(out=0)}
    constants = {"H": heads, "K": kv_heads, "E": e, "F": f, "PAGE": page_size, "EPS": args["eps"], "OFFSET": args["offset"], "BLOCK": block}
    constants |= scale_constants(call) | style_constants(args["style"], args["cos"].shape[-1])
    total = heads + 2 * kv_heads
    found = []
    # few tokens need many small programs, many tokens fewer and larger ones
    for rank, size in enumerate((512, 2048) if steps.max_tokens <= 64 else (2048, 512)):
        block_h = min(power_of_two(total), max(1, size // block))
        grid = ((args["qkv"].shape[0], 1), (total, block_h))
        one = launch(call, [qkv_rope_kv_write_kernel, rotation, *WRITE_HEAD], operands, constants | {"BLOCK_H": block_h}, grid)
        found.append(Candidate(f"h{block_h}", (one,), rank=rank))
    return list({c.name: c for c in found}.values())
