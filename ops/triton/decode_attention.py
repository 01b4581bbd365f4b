"""A decode step's attention in one kernel: head norms, rotation, the KV write, and paged attention split over the keys.

A program takes one sequence, the query heads of one kv head and a part of the cached keys; the first part also brings the new key and value, from registers,
and writes them to their page (Flash-Decoding, Dao et al. 2023). Sequences that are much longer than the others have more parts, which each program finds from
the lengths alone. Cached keys were written by earlier steps, so that the first of a part are asked for before this step's projection has ended.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from ..chain import chain
from ..dims import plus, product
from ..kernel import Call, Candidate, Operand, Steps, Tensor, Tickets, claimants, claims
from ..quantize import LARGEST
from ..target import Target
from .activations import tanh
from .kv_cache import CACHES, scale_constants
from .parts import FEWEST, cached, cached_of_all, extra_items, extra_parts, part_of, splits_of
from .quantize import row_scale, to_eight_bits
from .rotary import rotation, style_constants
from .source import FLOATS, launch, power_of_two, supported
from .tickets import is_last


@triton.jit
def load_heads(base, own, partner, mask, turns):
    """Heads at `base` [M, 1], and what each element is rotated with, in float32 [M, BLOCK_E]."""
    h = tl.load(base + own, mask=mask, other=0.0).to(tl.float32)
    return h, tl.load(base + partner, mask=mask & turns, other=0.0).to(tl.float32)


@triton.jit
def turned(h, p, gain, partner_gain, sign, c, s, turns, NORM: tl.constexpr, E: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr):
    """Heads of E columns as `load_heads` has them, with NORM normalized with a weight that `load_heads` has read too, then rotated."""
    if NORM:
        rstd = tl.rsqrt(tl.sum(h * h, 1) / E + EPS)[:, None]
        h *= rstd * (gain + OFFSET)
        p *= rstd * (partner_gain + OFFSET)
    return tl.where(turns, h * c + p * (s * sign), h)


@triton.jit
def load_keys(k_cache, v_cache, k_scale, v_scale, pages, kv_head, begin, high, K: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PAGE: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr):  # fmt: skip
    """Keys `begin` … high − 1, at most BLOCK_N, as [BLOCK_E, BLOCK_N], their values [BLOCK_N, BLOCK_F], the scales of both, and which of them there are."""
    e = tl.arange(0, BLOCK_E)
    f = tl.arange(0, BLOCK_F)
    n = begin + tl.arange(0, BLOCK_N)
    there = n < high
    place = n.to(tl.uint32)  # divided as a signed number, each key would take registers of its own
    row = (tl.load(pages + place // PAGE, mask=there, other=0).to(tl.int64) * K + kv_head) * PAGE + place % PAGE
    k = tl.load(k_cache + row[None, :] * E + e[:, None], mask=there[None, :] & (e < E)[:, None], other=0.0)
    v = tl.load(v_cache + row[:, None] * F + f[None, :], mask=there[:, None] & (f < F)[None, :], other=0.0)
    k_by = there
    v_by = there
    if k_scale is not None:
        k_by = tl.load(k_scale + row, mask=there, other=0.0)
        v_by = tl.load(v_scale + row, mask=there, other=0.0)
    return k, v, k_by, v_by, there


@triton.jit
def fold_keys(q, size, acc, top, total, unit, k, v, k_by, v_by, there, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr):
    """Fold keys and values as `load_keys` has them into (acc, top, total); `unit`: of acc, the largest scale of a value so far."""
    LOG2E: tl.constexpr = 1.4426950408889634
    scores = tl.dot(q, k.to(q.dtype))
    if SCALED:
        scores *= size[:, None] * k_by[None, :]
    if SOFTCAP > 0:
        scores = SOFTCAP * LOG2E * tanh(scores * (SCALE / SOFTCAP))
    else:
        scores *= SCALE * LOG2E
    scores = tl.where(there[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    origin = tl.where(higher == float("-inf"), 0.0, higher)  # of a part without keys
    p = tl.exp2(scores - origin[:, None])
    decay = tl.exp2(top - origin)
    total = total * decay + tl.sum(p, 1)
    v = v.to(q.dtype)
    if SCALED:
        larger = tl.maximum(unit, tl.max(v_by, 0))
        v *= (v_by * (1.0 / larger)).to(q.dtype)[:, None]  # v and not p: so v is widened before it is transposed, and not byte by byte
        decay *= unit * (1.0 / larger)
        unit = larger
    return tl.dot(p.to(q.dtype), v, acc * decay[:, None]), higher, total, unit


@triton.jit
def combine_parts(partial, lse, sinks, out, token, head, first, first_extra, count, COUNT: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
                  SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr):  # fmt: skip
    """COUNT ≤ BLOCK_H heads from `head` on of a token, whose `count` parts are SPLITS items from `first` on, the others from `first_extra` on; CHUNK at a time.
    What other programs have stored comes from L2, and all of a chunk's at once: each way there and back takes as long as does another head's."""
    h = tl.arange(0, BLOCK_H)
    f = tl.arange(0, BLOCK_F)
    acc = tl.zeros([BLOCK_H, BLOCK_F], tl.float32)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    if sinks is not None:
        top = tl.load(sinks + head + h, mask=h < COUNT, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    for begin in range(0, count, CHUNK):
        part = begin + tl.arange(0, CHUNK)
        item = part + tl.where(part < SPLITS, first, first_extra - SPLITS)
        at = item.to(tl.int64)[None, :] * H + head + h[:, None]
        mask = (part < count)[None, :] & (h < COUNT)[:, None]
        size = tl.load(lse + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
        values = tl.load(partial + at[:, :, None] * F + f[None, None, :], mask=mask[:, :, None] & (f < F)[None, None, :], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(size, 1))
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(size - origin[:, None])
        decay = tl.exp2(top - origin)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None] + tl.sum(values * weight[:, :, None], 1)
        top = higher
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    rows = token * H + head + h
    tl.store(out + rows[:, None] * F + f[None, :], acc.to(out.dtype.element_ty), mask=(h < COUNT)[:, None] & (f < F)[None, :])


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
                            sinks, out, partial, lse, tickets, num_seqs, num_columns, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
                            PAGE: tl.constexpr, STATIC: tl.constexpr, K_LARGEST: tl.constexpr, V_LARGEST: tl.constexpr, R: tl.constexpr, TABLE: tl.constexpr,
                            STYLE: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
                            CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
                            BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, EXTRA: tl.constexpr, FEWEST: tl.constexpr,
                            CHUNK_S: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Of sequences in several parts, `partial` [EXTRA + T · SPLITS, H, F] are the parts' normalized results by item and `lse` [EXTRA + T · SPLITS, H] their
    log2-sum-exp2; the last program of a sequence's parts to end, by `tickets` [T, K], combines them to `out`."""
    GROUP: tl.constexpr = H // K
    LOG2E: tl.constexpr = 1.4426950408889634
    SCALED: tl.constexpr = k_scale is not None
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    seq, length, part, count, low, high = part_of(item, seq_lens, num_seqs, SPLITS, EXTRA, FEWEST, WINDOW, CHUNK, BLOCK_S)
    if part < count:
        token = seq.to(tl.int64)
        position = length - 1  # −1: a padding row
        pages = page_table + token * num_columns
        k, v, k_by, v_by, there = load_keys(k_cache, v_cache, k_scale, v_scale, pages, kv_head, low, high, K, E, F, PAGE, BLOCK_N, BLOCK_E, BLOCK_F)
        e = tl.arange(0, BLOCK_E)
        f = tl.arange(0, BLOCK_F)
        own, partner, sign, column = rotation(e, R, STYLE, HALF)
        turns = (e < R)[None, :]
        own = tl.where(e < R, own, e)[None, :]
        partner = partner[None, :]
        sign = sign[None, :]
        m = tl.arange(0, BLOCK_M)
        head = kv_head * GROUP + m
        valid = m < GROUP
        wide = (e < E)[None, :]
        one = tl.zeros([1, 1], tl.int32)
        q_gain = one.to(tl.float32)
        q_partner_gain = q_gain
        k_gain = q_gain
        k_partner_gain = q_gain
        if q_weight is not None:
            q_gain, q_partner_gain = load_heads(q_weight + one, own, partner, wide, turns)
        if k_weight is not None:
            k_gain, k_partner_gain = load_heads(k_weight + one, own, partner, wide, turns)
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if PDL:
            tl.extra.cuda.gdc_wait()  # for this step's projection, while the first keys are on their way
        start = qkv + token * ((H + K) * E + K * F)
        # all that is read from memory, before the first of it is used
        brings = one + part == 0  # the first part has the new key and value
        q, q_partner = load_heads(start + head[:, None] * E, own, partner, valid[:, None] & wide, turns)
        k_new, k_partner = load_heads(start + (H + kv_head) * E + one, own, partner, wide & brings, turns)
        v_new = tl.load(start + (H + K) * E + kv_head * F + one + f[None, :], mask=(f < F)[None, :] & brings, other=0.0).to(tl.float32)
        c = tl.load(cos + token * TABLE + column, mask=e < R, other=1.0).to(tl.float32)[None, :]
        s = tl.load(sin + token * TABLE + column, mask=e < R, other=0.0).to(tl.float32)[None, :]
        q = turned(q, q_partner, q_gain, q_partner_gain, sign, c, s, turns, q_weight is not None, E, EPS, OFFSET)
        size = valid
        if SCALED:
            size = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)
            q = (q / size[:, None]).to(tl.float16)
        else:
            q = q.to(qkv.dtype.element_ty)
        unit = tl.full([], 1e-30, tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if part == 0:
            k_new = turned(k_new, k_partner, k_gain, k_partner_gain, sign, c, s, turns, k_weight is not None, E, EPS, OFFSET)
            place = (slot // PAGE * K + kv_head) * PAGE + slot % PAGE + one
            if SCALED:
                new_key, new_key_by = eight_bit_row(k_new, k_static, kv_head, k_cache.dtype.element_ty, STATIC, K_LARGEST)
                new_value, new_value_by = eight_bit_row(v_new, v_static, kv_head, v_cache.dtype.element_ty, STATIC, V_LARGEST)
                tl.store(k_scale + place, new_key_by, mask=slot >= 0)
                tl.store(v_scale + place, new_value_by, mask=slot >= 0)
            else:
                new_key = k_new.to(k_cache.dtype.element_ty)
                new_value = v_new.to(v_cache.dtype.element_ty)
            tl.store(k_cache + place * E + e[None, :], new_key, mask=wide & (slot >= 0))
            tl.store(v_cache + place * F + f[None, :], new_value, mask=(f < F)[None, :] & (slot >= 0))
            if position >= 0:
                top = tl.sum(q.to(tl.float32) * new_key.to(tl.float32), 1)
                if SCALED:
                    top *= size * tl.sum(new_key_by)
                    unit = tl.maximum(unit, tl.sum(new_value_by))
                if SOFTCAP > 0:
                    top = SOFTCAP * LOG2E * tanh(top * (SCALE / SOFTCAP))
                else:
                    top *= SCALE * LOG2E
                total += 1.0
                acc += new_value.to(tl.float32)
        acc, top, total, unit = fold_keys(q, size, acc, top, total, unit, k, v, k_by, v_by, there, SCALE, SOFTCAP, SCALED)
        for begin in range(low + BLOCK_N, high, BLOCK_N):
            keys = load_keys(k_cache, v_cache, k_scale, v_scale, pages, kv_head, begin, high, K, E, F, PAGE, BLOCK_N, BLOCK_E, BLOCK_F)
            acc, top, total, unit = fold_keys(q, size, acc, top, total, unit, keys[0], keys[1], keys[2], keys[3], keys[4], SCALE, SOFTCAP, SCALED)
        if SCALED:
            acc *= unit
        if SPLITS + EXTRA > 1 and count > 1:
            at = item.to(tl.int64) * H + head
            tl.store(lse + at, top + tl.log2(total), mask=valid)
            acc /= tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(partial + at[:, None] * F + f[None, :], acc, mask=valid[:, None] & (f < F)[None, :])
            if is_last(tickets + token * K + kv_head, count):
                first_extra = 0
                if EXTRA > 0:  # noqa: SIM102 (decided when this is compiled)
                    if count > SPLITS:
                        keys, most = cached_of_all(seq_lens, num_seqs, EXTRA, FEWEST, WINDOW, CHUNK, BLOCK_S)
                        _, first_extra = extra_parts(keys, most, seq, SPLITS, BLOCK_S)
                for mine in tl.static_range(0, GROUP, BLOCK_H):
                    combine_parts(partial, lse, sinks, out, token, kv_head * GROUP + mine, EXTRA + seq * SPLITS, first_extra, count,
                                  min(BLOCK_H, GROUP - mine), H, F, SPLITS, CHUNK_S, BLOCK_H, BLOCK_F)  # fmt: skip
        else:
            if sinks is not None:
                sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
                higher = tl.maximum(top, sink)
                decay = tl.exp2(top - higher)
                total = total * decay + tl.exp2(sink - higher)
                acc *= decay[:, None]
            acc /= tl.where(total == 0.0, 1.0, total)[:, None]
            at = token * H + head
            tl.store(out + at[:, None] * F + f[None, :], acc.to(out.dtype.element_ty), mask=valid[:, None] & (f < F)[None, :])


# keys a block, warps, pipeline stages: a warp that has all keys of a block for itself waits for no other, and many such programs fit on a multiprocessor
TILES = ((32, 1, 4), (64, 2, 4), (64, 1, 4), (128, 4, 2))
HEADS_AT_ONCE = 4
"""Of one kv head, that the last program combines together."""


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
    functions = [decode_attention_kernel, combine_parts, is_last, fold_keys, load_keys, eight_bit_row, row_scale, to_eight_bits, turned, load_heads, part_of,
                 extra_parts, cached_of_all, cached, rotation, tanh]  # fmt: skip

    def one(splits: int, block_n: int, warps: int, stages: int) -> Candidate:
        extra = extra_items(steps, kv_heads, splits)
        constants: dict[str, Any] = {
            "H": heads, "K": kv_heads, "E": e, "F": f, "PAGE": page_size, "EPS": args["eps"], "OFFSET": args["offset"], "SCALE": args["scale"],
            "WINDOW": args["window"], "CHUNK": args["chunk"], "SOFTCAP": args["softcap"], "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_E": block_e,
            "BLOCK_F": block_f, "BLOCK_S": power_of_two(steps.max_seqs), "SPLITS": splits, "EXTRA": extra, "FEWEST": FEWEST,
        } | scale_constants(call) | style_constants(args["style"], args["cos"].shape[-1])  # fmt: skip
        # partial results that the last program has at once, in a quarter of its registers: the next ones are on their way in another
        constants |= {"BLOCK_H": block_h, "CHUNK_S": min(power_of_two(splits + extra), max(1, 2048 * warps // (block_h * block_f)))}
        scratch: tuple[Tensor, ...] = ()
        results = {"out": Operand(out=0)}
        if splits + extra > 1:
            parts = plus(product(tokens, heads * splits), heads * extra)
            scratch = (Tensor(torch.float32, (parts, f)), Tensor(torch.float32, (parts,)), Tickets(torch.int32, (product(tokens, kv_heads),)))
            results |= {"partial": Operand(scratch=0), "lse": Operand(scratch=1), "tickets": Operand(scratch=2)}
        constants |= {p: None for p in ("partial", "lse", "tickets") if p not in results}
        operands = inputs | results | {"num_seqs": Operand(size=tokens), "num_columns": Operand(size=args["page_table"].shape[1])}
        grid = ((kv_heads, 1), (plus(product(tokens, splits), extra), 1))
        this = launch(call, functions, operands, constants, grid, scratch=scratch, num_warps=warps, num_stages=stages)
        name = f"one_n{block_n}_w{warps}_s{stages}" + (f"_split{splits}" if splits > 1 else "")
        return Candidate(name, (this,), scratch)

    found = [one(s, *tile) for s in splits_of(steps, kv_heads) for tile in TILES]
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
