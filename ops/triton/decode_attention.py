"""A decode step's attention in one kernel: head norms, rotation, the KV write, and paged attention split over the keys.

A program takes one sequence, the query heads of one kv head and a share of the cached keys; the first share also brings the new
key and value, from registers, and writes them to their page (Flash-Decoding, Dao et al. 2023). Cached keys were written by earlier
steps, so their way to L2 begins before this step's projection has ended.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from ..chain import chain
from ..dims import product
from ..kernel import Call, Candidate, Operand, Steps, Tensor, Tickets, claimants, claims
from ..quantize import LARGEST
from ..target import Target
from .activations import tanh
from .attention import PROGRAMS, combine, combine_kernel, most_splits
from .kv_cache import CACHES, scale_constants
from .prefetch import prefetch_rows
from .quantize import row_scale, to_eight_bits
from .rotary import rotation, style_constants
from .source import FLOATS, launch, power_of_two, supported
from .tickets import is_last


@triton.jit
def head_rows(base, own, partner, sign, c, s, weight, mask, turns, E: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr):
    """Heads at `base` [M, 1] of E columns, normalized if there is a weight, then rotated, in float32 [M, BLOCK_E]."""
    h = tl.load(base + own, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(base + partner, mask=mask & turns, other=0.0).to(tl.float32)
    if weight is not None:
        rstd = tl.rsqrt(tl.sum(h * h, 1) / E + EPS)[:, None]
        h *= rstd * (tl.load(weight + own, mask=mask, other=0.0).to(tl.float32) + OFFSET)
        p *= rstd * (tl.load(weight + partner, mask=mask & turns, other=0.0).to(tl.float32) + OFFSET)
    return tl.where(turns, h * c + p * (s * sign), h)


@triton.jit
def eight_bit_row(h, static, head, dtype: tl.constexpr, STATIC: tl.constexpr, LARGEST: tl.constexpr):
    """A row [1, N] in eight bits and its scale [1, 1]; see `ops.quantize`."""
    if static is not None:
        scale = tl.load(static + (head if STATIC > 1 else 0)) + tl.zeros([1, 1], tl.float32)
    else:
        scale = row_scale(h, LARGEST)
    return to_eight_bits(h, scale, dtype, LARGEST), scale


@triton.jit
def decode_attention_kernel(qkv, cos, sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, k_static, v_static, slot_mapping, seq_lens, page_table,
                            sinks, out, partial, lse, tickets, num_columns, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
                            PAGE: tl.constexpr, STATIC: tl.constexpr, K_LARGEST: tl.constexpr, V_LARGEST: tl.constexpr, R: tl.constexpr, TABLE: tl.constexpr,
                            STYLE: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
                            CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
                            BLOCK_F: tl.constexpr, SPLITS: tl.constexpr, CHUNK_S: tl.constexpr, BLOCK_H: tl.constexpr, THREADS: tl.constexpr,
                            PDL: tl.constexpr):  # fmt: skip
    """With SPLITS > 1, `partial` is [T, H, SPLITS, F] of normalized partial results and `lse` [T, H, SPLITS] their log2-sum-exp2.

    With `tickets` [T, K], the last program of a kv head combines them to `out`.
    """
    GROUP: tl.constexpr = H // K
    LOG2E: tl.constexpr = 1.4426950408889634
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(seq_lens + token) - 1  # −1: a padding row
    low = 0
    if WINDOW > 0:
        low = tl.maximum(position - WINDOW + 1, 0)
    if CHUNK > 0:
        low = tl.maximum(low, tl.maximum(position, 0) // CHUNK * CHUNK)
    share = ((position - low + SPLITS - 1) // SPLITS + 15) // 16 * 16
    low += split * share
    high = tl.minimum(position, low + share)
    pages = page_table + token * num_columns
    e = tl.arange(0, BLOCK_E)
    f = tl.arange(0, BLOCK_F)
    if PDL:
        first = low + tl.arange(0, BLOCK_N)
        ahead = (tl.load(pages + first // PAGE, mask=first < high, other=0).to(tl.int64) * K + kv_head) * PAGE + first % PAGE
        if low < high:
            prefetch_rows(k_cache + ahead * E, BLOCK_N, E * k_cache.dtype.element_ty.primitive_bitwidth // 8, THREADS)
            prefetch_rows(v_cache + ahead * F, BLOCK_N, F * v_cache.dtype.element_ty.primitive_bitwidth // 8, THREADS)
        tl.extra.cuda.gdc_wait()
    own, partner, sign, column = rotation(e, R, STYLE, HALF)
    turns = (e < R)[None, :]
    own = tl.where(e < R, own, e)[None, :]
    partner = partner[None, :]
    sign = sign[None, :]
    c = tl.load(cos + token * TABLE + column, mask=e < R, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * TABLE + column, mask=e < R, other=0.0).to(tl.float32)[None, :]
    m = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + m
    valid = m < GROUP
    wide = (e < E)[None, :]
    start = qkv + token * ((H + K) * E + K * F)
    q = head_rows(start + head[:, None] * E, own, partner, sign, c, s, q_weight, valid[:, None] & wide, turns, E, EPS, OFFSET)
    if k_scale is not None:
        size = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)
        q = (q / size[:, None]).to(tl.float16)
    else:
        q = q.to(qkv.dtype.element_ty)
    unit = tl.full([], 1e-30, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if split == 0:
        one = tl.zeros([1, 1], tl.int32)
        k_new = head_rows(start + (H + kv_head) * E + one, own, partner, sign, c, s, k_weight, wide, turns, E, EPS, OFFSET)
        v_new = tl.load(start + (H + K) * E + kv_head * F + f[None, :], mask=(f < F)[None, :], other=0.0).to(tl.float32)
        slot = tl.load(slot_mapping + token).to(tl.int64)
        place = (slot // PAGE * K + kv_head) * PAGE + slot % PAGE + one
        if k_scale is not None:
            k_new, k_by = eight_bit_row(k_new, k_static, kv_head, k_cache.dtype.element_ty, STATIC, K_LARGEST)
            v_new, v_by = eight_bit_row(v_new, v_static, kv_head, v_cache.dtype.element_ty, STATIC, V_LARGEST)
            tl.store(k_scale + place, k_by, mask=slot >= 0)
            tl.store(v_scale + place, v_by, mask=slot >= 0)
        else:
            k_new = k_new.to(k_cache.dtype.element_ty)
            v_new = v_new.to(v_cache.dtype.element_ty)
        tl.store(k_cache + place * E + e[None, :], k_new, mask=wide & (slot >= 0))
        tl.store(v_cache + place * F + f[None, :], v_new, mask=(f < F)[None, :] & (slot >= 0))
        if position >= 0:
            top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1)
            if k_scale is not None:
                top *= size * tl.sum(k_by)
                unit = tl.maximum(unit, tl.sum(v_by))
            if SOFTCAP > 0:
                top = SOFTCAP * LOG2E * tanh(top * (SCALE / SOFTCAP))
            else:
                top *= SCALE * LOG2E
            total += 1.0
            acc += v_new.to(tl.float32)
    for begin in range(low, high, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        there = n < high
        row = (tl.load(pages + n // PAGE, mask=there, other=0).to(tl.int64) * K + kv_head) * PAGE + n % PAGE
        k = tl.load(k_cache + row[None, :] * E + e[:, None], mask=there[None, :] & (e < E)[:, None], other=0.0).to(q.dtype)
        v = tl.load(v_cache + row[:, None] * F + f[None, :], mask=there[:, None] & (f < F)[None, :], other=0.0).to(q.dtype)
        scores = tl.dot(q, k)
        if k_scale is not None:
            scores *= size[:, None] * tl.load(k_scale + row, mask=there, other=0.0)[None, :]
        if SOFTCAP > 0:
            scores = SOFTCAP * LOG2E * tanh(scores * (SCALE / SOFTCAP))
        else:
            scores *= SCALE * LOG2E
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(p, 1)
        if v_scale is not None:
            scale = tl.load(v_scale + row, mask=there, other=0.0)
            larger = tl.maximum(unit, tl.max(scale, 0))
            v *= (scale * (1.0 / larger)).to(q.dtype)[:, None]  # v and not p: so v is widened before it is transposed, and not byte by byte
            decay *= unit * (1.0 / larger)
            unit = larger
        acc = tl.dot(p.to(q.dtype), v, acc * decay[:, None])
        top = higher
    if v_scale is not None:
        acc *= unit
    at = token * H + head
    if SPLITS > 1:
        at = at * SPLITS + split
        tl.store(lse + at, top + tl.log2(total), mask=valid)
        acc /= tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(partial + at[:, None] * F + f[None, :], acc, mask=(valid & (total > 0.0))[:, None] & (f < F)[None, :])
        if tickets is not None:  # noqa: SIM102 (decided when this is compiled)
            if is_last(tickets + token * K + kv_head, SPLITS):
                for mine in tl.static_range(0, GROUP, BLOCK_H):
                    one_of = kv_head * GROUP + mine
                    combine(partial, lse, sinks, out, token * H + one_of, one_of, min(BLOCK_H, GROUP - mine), F, SPLITS, CHUNK_S, BLOCK_H, BLOCK_F)
    else:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
            higher = tl.maximum(top, sink)
            decay = tl.exp2(top - higher)
            total = total * decay + tl.exp2(sink - higher)
            acc *= decay[:, None]
        acc /= tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + at[:, None] * F + f[None, :], acc.to(out.dtype.element_ty), mask=valid[:, None] & (f < F)[None, :])


# keys a block, warps, pipeline stages: a warp that has all keys of a block for itself waits for no other, and many such programs fit on a multiprocessor
TILES = ((32, 1, 4), (64, 2, 4), (128, 4, 2), (32, 1, 5))
HEADS_AT_ONCE = 4
"""Of one kv head, that the last program combines together."""


def _splits(steps: Steps, kv_heads: int) -> list[int]:
    """Programs a (sequence, kv head): four times as many as fill the GPU, so that sequences of unlike lengths even out; a half, or a quarter of that."""
    most = most_splits(steps.max_seqs * kv_heads, 4 * PROGRAMS)
    return [s for s in (most, most // 2, most // 4) if s > 0]


def _in_one(call: Call, steps: Steps) -> list[Candidate]:
    args = call.args
    qkv, k_cache, v_cache = args["qkv"], args["k_cache"], args["v_cache"]
    heads, kv_heads = args["num_heads"], args["num_kv_heads"]
    page_size, e, f = k_cache.shape[2], k_cache.shape[3], v_cache.shape[3]
    tokens, block_e, block_f = qkv.shape[0], max(16, power_of_two(e)), max(16, power_of_two(f))
    block_m, block_h = max(16, power_of_two(heads // kv_heads)), min(power_of_two(heads // kv_heads), HEADS_AT_ONCE)
    if not steps.exact or steps.max_num_new != 1 or qkv.dtype == torch.float32 or block_m * block_f > 64 * 256:
        return []
    inputs = {n: Operand(arg=n) for n in ("qkv", "cos", "sin", "q_weight", "k_weight", *CACHES, "slot_mapping", "seq_lens", "page_table", "sinks")}
    functions = [decode_attention_kernel, combine, is_last, eight_bit_row, row_scale, to_eight_bits, head_rows, rotation, prefetch_rows, tanh]

    def one(splits: int, tile: tuple[int, int, int], apart: bool = False) -> Candidate:
        """`apart`: partial results are combined by a launch of their own."""
        block_n, warps, stages = tile
        constants: dict[str, Any] = {
            "H": heads, "K": kv_heads, "E": e, "F": f, "PAGE": page_size, "EPS": args["eps"], "OFFSET": args["offset"], "SCALE": args["scale"],
            "WINDOW": args["window"], "CHUNK": args["chunk"], "SOFTCAP": args["softcap"], "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_E": block_e,
            "BLOCK_F": block_f, "SPLITS": splits, "THREADS": 32 * warps,
        } | scale_constants(call) | style_constants(args["style"], args["cos"].shape[-1])  # fmt: skip
        # partial results that the last program has at once, in a quarter of its registers: the next ones are on their way in another
        constants |= {"BLOCK_H": block_h, "CHUNK_S": min(splits, max(1, 2048 * warps // (block_h * block_f)))}
        scratch: tuple[Tensor, ...] = ()
        results = {"out": Operand(out=0)}
        if splits > 1:
            parts = product(tokens, heads * splits)
            scratch = (Tensor(torch.float32, (parts, f)), Tensor(torch.float32, (parts,)))
            results = ({} if apart else results) | {"partial": Operand(scratch=0), "lse": Operand(scratch=1)}
            if not apart:
                scratch += (Tickets(torch.int32, (product(tokens, kv_heads),)),)
                results["tickets"] = Operand(scratch=2)
        constants |= {p: None for p in ("out", "partial", "lse", "tickets") if p not in results}
        operands = inputs | results | {"num_columns": Operand(size=args["page_table"].shape[1])}
        grid = ((tokens, 1), (kv_heads, 1), (splits, 1))
        launches = [launch(call, functions, operands, constants, grid, scratch=scratch, num_warps=warps, num_stages=stages)]
        if apart:
            combined = {"partial": Operand(scratch=0), "lse": Operand(scratch=1), "sinks": Operand(arg="sinks"), "out": Operand(out=0)}
            small = {"H": heads, "F": f, "SPLITS": splits, "BLOCK_F": block_f}
            launches.append(launch(call, [combine_kernel, combine], combined, small, ((tokens, 1), (heads, 1)), scratch=scratch))
        name = f"one_n{block_n}_w{warps}_s{stages}" + (f"_split{splits}" if splits > 1 else "") + ("_apart" if apart else "")
        return Candidate(name, tuple(launches), scratch)

    splits = _splits(steps, kv_heads)
    found = [one(s, tile) for i, s in enumerate(splits) for tile in TILES[: 4 - i]]
    found += [one(splits[0], TILES[0], apart=True)] if splits[0] > 1 else []
    return [replace(c, rank=i / 20) for i, c in enumerate(found)]


@claims("qkv_attention", "triton")
def qkv_attention(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """Of a decode step in one kernel; else head norms, rotation and the KV write, then every way to attend."""
    args = call.args
    held = FLOATS if args["k_scale"] is None else LARGEST
    if not supported(call, target) or args["qkv"].dtype not in FLOATS or any(args[c].dtype not in held for c in ("k_cache", "v_cache")):
        return []
    heads = ("qkv", "cos", "sin", "q_weight", "k_weight", *CACHES, "slot_mapping", "num_heads", "num_kv_heads", "style", "eps", "offset")
    q = Tensor(args["qkv"].dtype, (args["qkv"].shape[0], args["num_heads"], args["k_cache"].shape[3]))
    names = ("k_cache", "v_cache", "k_scale", "v_scale", "cu_seqlens_q", "seq_lens", "page_table", "sinks", "scale", "window", "chunk", "softcap")
    attention = Call("paged_attention", {"q": q, "alibi_slopes": None, **{n: args[n] for n in names}}, call.results)
    rope = Call("qkv_rope_kv_write", {n: args[n] for n in heads}, (q,))
    apart = [chain(head, q, "q", tail) for head in claimants(rope, steps, target)[:1] for tail in claimants(attention, steps, target)]
    return _in_one(call, steps) + [Candidate(c.name, c.launches, c.scratch, 5.0 + c.rank) for c in apart]
