"""Multi-head latent attention over the paged cache of latents, and the batched products and the write around it.

A tile of the attention is `BLOCK_M` rows of q, heads of one token or of neighbouring ones, which in memory are neighbours too. A block of cached
tokens [BLOCK_N, L + R] is read once for all of them, and its first L columns are multiplied twice, as keys and as values. In a decode step the
cached tokens are split over programs (Flash-Decoding, Dao et al. 2023); with `indices` a tile belongs to one token and walks its list.

The floor of a decode step is 2(L + R) bytes a cached token and sequence, or 2(L + R) + 2L flops a cached token and head: at L = 512 and R = 64, 1,152
bytes and 2,176 flops, so that 16 heads (30 flops a byte) wait for memory on any GPU and 128 heads (242) are near the balance of an H100 (295).
A sum [rows, 512] in float32 is what fills the registers: 64 a thread for 16 rows over 4 warps, 128 for 64 rows over 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..dims import plus, product
from ..kernel import Call, Candidate, Launch, Operand, Steps, Tensor, claims
from ..target import SHARED_MEMORY_BYTES, Target
from .attention import PROGRAMS, combine, combine_kernel, most_splits
from .prefetch import prefetch_rows
from .ragged import tile_of, tiles_of
from .rotary import rotation, style_constants
from .sampling import key_of
from .source import FLOATS, launch, most, power_of_two, supported


@triton.jit
def place_of(token, cu_seqlens_q, seq_lens, num_tokens, num_seqs, BLOCK_S: tl.constexpr, EXACT: tl.constexpr):
    """The sequence and the position of a token; −1 of one that no sequence has."""
    if EXACT:
        seq = token
        position = tl.load(seq_lens + token) - 1
    else:
        s = tl.arange(0, BLOCK_S)
        seq = tl.sum((tl.load(cu_seqlens_q + s, mask=s <= num_seqs, other=1 << 30) <= token).to(tl.int32)) - 1
        length = tl.load(seq_lens + seq, mask=seq < num_seqs, other=0)
        end = tl.load(cu_seqlens_q + seq + 1, mask=seq < num_seqs, other=num_tokens)
        position = tl.where(length > 0, length - end + token, -1)
    return seq, position


@triton.jit
def mla_attention_kernel(q_latent, q_rope, latent_cache, cu_seqlens_q, seq_lens, page_table, indices, sinks, out, lse, num_tokens, num_seqs, num_columns,
                         H: tl.constexpr, L: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, TOPK: tl.constexpr, SCALE: tl.constexpr,
                         WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
                         BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, EXACT: tl.constexpr, SWAP: tl.constexpr,
                         THREADS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """EXACT: sequences have one new token each. SWAP: the cached tokens are the rows of both products, of which matrix units want 64, not the heads.

    With SPLITS > 1, `out` is [T, H, SPLITS, L] of normalized partial results and `lse` [T, H, SPLITS] their log2-sum-exp2; see `combine_kernel`.
    """
    KEYS: tl.constexpr = 0 if SWAP else 1  # the axis of scores that counts cached tokens
    ROWS: tl.constexpr = 1 - KEYS
    LOG2E: tl.constexpr = 1.4426950408889634
    split = tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not EXACT:
            tl.extra.cuda.gdc_wait()
    # rows `first` … of the `count` rows of a token or a sequence, which begin at `base`; their positions begin at `origin`
    if EXACT or indices is not None:
        token = tl.program_id(0)
        seq, origin = place_of(token, cu_seqlens_q, seq_lens, num_tokens, num_seqs, BLOCK_S, EXACT)
        base = token * H
        count = H
        first = tl.program_id(1) * BLOCK_M
        length = origin + 1
    else:
        tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most before them first
        seq, start, first = tile_of(tile, cu_seqlens_q, num_seqs, H, BLOCK_M, BLOCK_S)
        queries = tl.load(cu_seqlens_q + seq + 1, mask=seq < num_seqs, other=num_tokens) - start
        length = tl.load(seq_lens + seq, mask=seq < num_seqs, other=0)
        base = start * H
        count = queries * H
        origin = length - queries
    if first < count:
        low = 0
        high = tl.minimum(length, origin + (tl.minimum(first + BLOCK_M, count) - 1) // H + 1)
        if indices is not None:
            listed = tl.arange(0, BLOCK_K)
            chosen = tl.load(indices + token.to(tl.int64) * TOPK + listed, mask=listed < TOPK, other=-1)
            high = tl.where(length > 0, tl.max(tl.where(chosen >= 0, listed + 1, 0)), 0)
        elif WINDOW > 0:
            low = tl.maximum(origin + first // H - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        if SPLITS > 1:
            share = tl.cdiv(tl.cdiv(high - low, SPLITS), BLOCK_N) * BLOCK_N
            low += split * share
            high = tl.minimum(high, low + share)
        pages = page_table + seq.to(tl.int64) * num_columns
        i = tl.arange(0, BLOCK_N)
        if PDL and EXACT:
            if indices is None:
                ahead = tl.load(pages + (low + i) // PAGE, mask=low + i < high, other=0).to(tl.int64) * PAGE + (low + i) % PAGE
                if low < high:
                    prefetch_rows(latent_cache + ahead * (L + R), BLOCK_N, (L + R) * latent_cache.dtype.element_ty.primitive_bitwidth // 8, THREADS)
            tl.extra.cuda.gdc_wait()
        m = first + tl.arange(0, BLOCK_M)
        valid = m < count
        row = base.to(tl.int64) + m
        position = tl.expand_dims(origin + m // H, KEYS)
        c = tl.arange(0, BLOCK_L)
        r = tl.arange(0, BLOCK_R)
        wide = tl.expand_dims(c < L, ROWS)
        inside = tl.expand_dims(valid, KEYS) & wide
        at = tl.expand_dims(row * L, KEYS) + tl.expand_dims(c, ROWS)
        q = tl.load(q_latent + at, mask=inside, other=0.0)
        if R > 0:
            q_r = tl.load(q_rope + tl.expand_dims(row * R, KEYS) + tl.expand_dims(r, ROWS), mask=tl.expand_dims(valid, KEYS) & tl.expand_dims(r < R, ROWS),
                          other=0.0)  # fmt: skip
        acc = tl.zeros([BLOCK_L, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_L], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for begin in range(low, high, BLOCK_N):
            n = begin + i
            there = n < high
            if indices is not None:
                n = tl.load(indices + token.to(tl.int64) * TOPK + n, mask=there, other=-1)
                there = n >= 0
            if indices is None and PAGE % BLOCK_N == 0:
                cached = tl.load(pages + begin // PAGE).to(tl.int64) * PAGE + begin % PAGE + i
            else:
                cached = tl.load(pages + n // PAGE, mask=there, other=0).to(tl.int64) * PAGE + n % PAGE
            latent = tl.load(latent_cache + (cached * (L + R))[:, None] + c[None, :], mask=there[:, None] & (c < L)[None, :], other=0.0)
            if SWAP:
                scores = tl.dot(latent, q, input_precision=PRECISION)
            else:
                scores = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
            if R > 0:
                rope = tl.load(latent_cache + (cached * (L + R) + L)[:, None] + r[None, :], mask=there[:, None] & (r < R)[None, :], other=0.0)
                if SWAP:
                    scores = tl.dot(rope, q_r, scores, input_precision=PRECISION)
                else:
                    scores = tl.dot(q_r, tl.trans(rope), scores, input_precision=PRECISION)
            key = tl.expand_dims(n, ROWS)
            seen = tl.expand_dims(there, ROWS) & (key <= position)
            if WINDOW > 0:
                seen = seen & (key > position - WINDOW)
            scores = tl.where(seen, scores * (SCALE * LOG2E), float("-inf"))
            higher = tl.maximum(top, tl.max(scores, KEYS))
            # a row that has seen nothing yet keeps −inf: measure it from 0, so that its weights are 0 and not NaN
            zero = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(scores - tl.expand_dims(zero, KEYS))
            decay = tl.exp2(top - zero)
            total = total * decay + tl.sum(p, KEYS)
            acc *= tl.expand_dims(decay, KEYS)
            if SWAP:
                acc = tl.dot(tl.trans(latent), p.to(latent.dtype), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(p.to(latent.dtype), latent, acc, input_precision=PRECISION)
            top = higher
        if SPLITS > 1:
            tl.store(lse + row * SPLITS + split, top + tl.log2(total), mask=valid)
            at = tl.expand_dims((row * SPLITS + split) * L, KEYS) + tl.expand_dims(c, ROWS)
            inside = inside & tl.expand_dims(total > 0.0, KEYS)
        elif sinks is not None:
            sink = tl.load(sinks + m % H, mask=valid, other=0.0).to(tl.float32) * LOG2E
            higher = tl.maximum(top, sink)
            decay = tl.exp2(top - higher)
            total = total * decay + tl.exp2(sink - higher)
            acc *= tl.expand_dims(decay, KEYS)
        acc /= tl.expand_dims(tl.where(total == 0.0, 1.0, total), KEYS)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    elif PDL and EXACT:
        tl.extra.cuda.gdc_wait()


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


@triton.jit
def latent_write_kernel(latent, rope, latent_cache, slot_mapping, L: tl.constexpr, R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
                        PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        at = latent_cache + slot * (L + R)  # one head: pages are rows in order
        c = tl.arange(0, BLOCK_L)
        tl.store(at + c, tl.load(latent + token * L + c, mask=c < L).to(latent_cache.dtype.element_ty), mask=c < L)
        if rope is not None:
            r = tl.arange(0, BLOCK_R)
            tl.store(at + L + r, tl.load(rope + token * R + r, mask=r < R).to(latent_cache.dtype.element_ty), mask=r < R)


@triton.jit
def latent_rope_write_kernel(q, kv, cos, sin, weight, latent_cache, slot_mapping, straight, turned, Q: tl.constexpr, Q_BEGIN: tl.constexpr,
                             Q_STEP: tl.constexpr, R_BEGIN: tl.constexpr, R_STEP: tl.constexpr, KV: tl.constexpr, KV_BEGIN: tl.constexpr,
                             H: tl.constexpr, NOPE: tl.constexpr, L: tl.constexpr, R: tl.constexpr, TABLE: tl.constexpr, STYLE: tl.constexpr,
                             HALF: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
                             BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows of q and kv have Q and KV elements. The first program of a token takes its latent and key, the others some heads of its queries each."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_R)
    own, partner, sign, column = rotation(j, R, STYLE, HALF)
    co = tl.load(cos + token * TABLE + column, mask=j < R, other=1.0).to(tl.float32)
    si = tl.load(sin + token * TABLE + column, mask=j < R, other=0.0).to(tl.float32) * sign
    if tl.program_id(1) == 0:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot >= 0:
            at = kv + token * KV + KV_BEGIN
            to = latent_cache + slot * (L + R)  # one head: pages are rows in order
            c = tl.arange(0, BLOCK_L)
            x = tl.load(at + c, mask=c < L, other=0.0).to(tl.float32)
            x *= tl.rsqrt(tl.sum(x * x, 0) / L + EPS) * (tl.load(weight + c, mask=c < L, other=0.0).to(tl.float32) + OFFSET)
            tl.store(to + c, x.to(latent_cache.dtype.element_ty), mask=c < L)
            x = tl.load(at + L + own, mask=j < R, other=0.0).to(tl.float32)
            y = tl.load(at + L + partner, mask=j < R, other=0.0).to(tl.float32)
            tl.store(to + L + j, (x * co + y * si).to(latent_cache.dtype.element_ty), mask=j < R)
    else:
        head = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        at = q + token * Q + Q_BEGIN + head * Q_STEP
        n = tl.arange(0, BLOCK_N)[None, :]
        inside = (head < H) & (n < NOPE)
        tl.store(straight + (token * H + head) * NOPE + n, tl.load(at + n, mask=inside), mask=inside)
        inside = (head < H) & (j < R)[None, :]
        at = q + token * Q + R_BEGIN + head * R_STEP
        x = tl.load(at + own[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(turned + (token * H + head) * R + j[None, :], (x * co[None, :] + y * si[None, :]).to(turned.dtype.element_ty), mask=inside)


@triton.jit
def best(key, there, TOPK: tl.constexpr):
    """Which TOPK of the keys are the largest, of equal ones the first (all, if there are fewer), and where each goes."""
    least = tl.where(tl.sum((there & (key >= 0)).to(tl.int32), 0) >= TOPK, 0, -(1 << 31))
    for bit in range(1, 32):
        probe = least + (1 << (31 - bit))
        reached = tl.sum((there & (key >= probe)).to(tl.int32), 0) >= TOPK
        least = tl.where(reached, probe, least)
    larger = there & (key > least)
    same = (there & (key == least)).to(tl.int32)
    kept = larger | ((same == 1) & (tl.cumsum(same, 0) <= TOPK - tl.sum(larger.to(tl.int32), 0)))
    return least, kept, tl.cumsum(kept.to(tl.int32), 0) - 1


@triton.jit
def prune(keys, places, count, to, TOPK: tl.constexpr, LIST: tl.constexpr, KEYS: tl.constexpr):
    """Move the places of the best of a list of `count` to `to`, with KEYS also their keys to the list's begin. Returns the least of them.

    Threads have written what others read, and read what others write: hence the barriers.
    """
    e = tl.arange(0, LIST)
    tl.debug_barrier()
    key = tl.load(keys + e, mask=e < count, other=0)
    place = tl.load(places + e, mask=e < count, other=0)
    least, kept, at = best(key, e < count, TOPK)
    tl.debug_barrier()
    if KEYS:
        tl.store(keys + at, key, mask=kept)
    tl.store(to + at, place, mask=kept)
    tl.debug_barrier()
    return least


@triton.jit
def all_of_few(out, position, TOPK: tl.constexpr, BLOCK_K: tl.constexpr):
    """A token that sees no more than TOPK positions sees all."""
    j = tl.arange(0, BLOCK_K)
    tl.store(out + j, tl.where(j <= position, j, -1), mask=j < TOPK)


@triton.jit
def sparse_index_kernel(q, weights, index_cache, cu_seqlens_q, seq_lens, page_table, keys, places, counts, out, num_tokens, num_seqs, num_columns,
                        J: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, TOPK: tl.constexpr, SCALE: tl.constexpr, BLOCK_J: tl.constexpr,
                        BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, LIST: tl.constexpr,
                        SPLITS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program takes token after token. It lists what scores above the least of the best so far, and when the list is full, keeps the best of it.

    With SPLITS > 1 programs share the positions of a token, and leave their lists to `merge_lists_kernel`.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    split = tl.program_id(1)
    number = tl.program_id(0).to(tl.int64) * SPLITS + split
    keys += number * LIST
    places += number * LIST
    i = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_J)
    d = tl.arange(0, BLOCK_D)
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        seq, position = place_of(token, cu_seqlens_q, seq_lens, num_tokens, num_seqs, BLOCK_S, EXACT)
        row = tl.cast(token, tl.int64)
        if position >= TOPK:
            pages = page_table + tl.cast(seq, tl.int64) * num_columns
            h = tl.load(q + row * J * D + j[None, :] * D + d[:, None], mask=(j < J)[None, :] & (d < D)[:, None], other=0.0)
            weight = tl.load(weights + row * J + j, mask=j < J, other=0.0).to(tl.float32)
            share = tl.cdiv(tl.cdiv(position + 1, SPLITS), BLOCK_N) * BLOCK_N
            least = tl.full([], -(1 << 31), tl.int32)
            count = tl.full([], 0, tl.int32)
            for begin in range(split * share, tl.minimum(position + 1, (split + 1) * share), BLOCK_N):
                n = begin + i
                cached = tl.load(pages + n // PAGE, mask=n <= position, other=0).to(tl.int64) * PAGE + n % PAGE
                k = tl.load(index_cache + cached[:, None] * D + d[None, :], mask=(n <= position)[:, None] & (d < D)[None, :], other=0.0)
                scores = tl.maximum(tl.dot(k, h, input_precision=PRECISION) * SCALE, 0.0)
                key = key_of(tl.sum(scores * weight[None, :], 1), 32)
                key = tl.maximum(key, 1 - (1 << 31))  # a NaN too is above nothing
                above = (n <= position) & (key > least)
                at = count + tl.cumsum(above.to(tl.int32), 0) - 1
                tl.store(keys + at, key, mask=above)
                tl.store(places + at, n, mask=above)
                count += tl.sum(above.to(tl.int32), 0)
                if count > LIST - BLOCK_N:
                    least = prune(keys, places, count, places, TOPK, LIST, True)
                    count = tl.full([], TOPK, tl.int32)
            if SPLITS == 1:
                prune(keys, places, count, out + row * TOPK, TOPK, LIST, False)
            else:
                prune(keys, places, count, places, TOPK, LIST, True)
                tl.store(counts + number, tl.minimum(count, TOPK))
        elif SPLITS == 1:
            all_of_few(out + row * TOPK, position, TOPK, BLOCK_K)


@triton.jit
def merge_lists_kernel(keys, places, counts, seq_lens, out, TOPK: tl.constexpr, BLOCK_K: tl.constexpr, LIST: tl.constexpr, SPLITS: tl.constexpr,
                       PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(seq_lens + token) - 1
    if position >= TOPK:
        e = tl.arange(0, SPLITS * BLOCK_K)
        number = token * SPLITS + e // BLOCK_K
        there = e % BLOCK_K < tl.load(counts + number)
        at = number * LIST + e % BLOCK_K
        _, kept, to = best(tl.load(keys + at, mask=there, other=0), there, TOPK)
        tl.store(out + token * TOPK + to, tl.load(places + at, mask=there, other=0), mask=kept)
    else:
        all_of_few(out + token * TOPK, position, TOPK, BLOCK_K)


@dataclass(frozen=True)
class Tile:
    """Rows of q and cached tokens of a step of the softmax; warps, pipeline stages; whether cached tokens are the rows of the products."""

    m: int
    n: int
    warps: int
    stages: int
    swap: bool = False

    def __str__(self) -> str:
        return f"m{self.m}_n{self.n}_w{self.warps}_s{self.stages}" + ("_swap" if self.swap else "")

    def shared_bytes(self, width: int, r: int, itemsize: int, arch: int) -> int:
        """Two stages a block in flight where page numbers are fetched one ahead of pages; what is swapped, and large tiles, from a block more."""
        blocks = max((self.stages - 1) // 2, 1) + (self.swap or self.m >= 64)
        transposed = 2 * self.n * width if arch >= 100 and self.m >= 64 else 0  # tensor memory is fed from a copy as values
        return (self.m * (width + r + self.n) + blocks * self.n * (width + r) + transposed) * itemsize


def tiles(rows: int, target: Target, listed: bool, width: int, r: int, itemsize: int) -> list[Tile]:
    """Tiles that fit in shared memory and, at L = 512, in registers, best first; `rows`: of a token or, of many, 64."""
    m = max(16, min(64, power_of_two(rows)))
    if itemsize == 4:  # multiplied without matrix units
        return [Tile(16, 16, 4, 1)]
    if m < 64:
        swapped = [Tile(m, 64, m // 4, 2, True)] if target.arch == 90 else []
        wanted = [*swapped, Tile(m, 32, m // 4, 5), Tile(m, 64, m // 4, 3), Tile(m, 32, m // 4, 3)]
    else:
        large = [Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)] if target.arch in (90, 100) else []  # where sums need not lie in a warp's registers
        wanted = [*large, Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)]
    if listed:  # an address for each cached token fills registers too
        wanted = [t for t in wanted if t.n == 32 or t.swap]
    fitting = [t for t in wanted if t.shared_bytes(width, r, itemsize, target.arch) <= SHARED_MEMORY_BYTES[target.isa]]
    return fitting[:3] or [Tile(16, 16, 4, 1)]


def _splits(programs: int) -> list[int]:
    """Programs that share a token's cached tokens, where there are so many without: enough that the largest step of the variant fills the GPU, or half."""
    most = most_splits(programs)
    return [most, most // 2] if most > 1 else [1]


def _precision(dtype: torch.dtype) -> str | None:
    return "ieee" if dtype == torch.float32 else None


@claims("mla_attention", "triton")
def mla_attention(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    q_latent, q_rope, latent_cache, indices = (args[n] for n in ("q_latent", "q_rope", "latent_cache", "indices"))
    if not supported(call, target) or q_latent.dtype not in FLOATS or not q_latent.dtype == q_rope.dtype == latent_cache.dtype:
        return []
    (tokens, heads, width), r, page_size = q_latent.shape, q_rope.shape[2], latent_cache.shape[2]
    seqs, columns = args["page_table"].shape
    topk = 0 if indices is None else indices.shape[1]
    exact = steps.exact and steps.max_num_new == 1
    of_token = exact or indices is not None
    block_l, block_r = max(16, power_of_two(width)), max(16, power_of_two(r))
    inputs = {n: Operand(arg=n) for n in ("q_latent", "q_rope", "latent_cache", "cu_seqlens_q", "seq_lens", "page_table", "indices", "sinks")}
    sizes = {"num_tokens": Operand(size=tokens), "num_seqs": Operand(size=seqs), "num_columns": Operand(size=columns)}
    found = []
    for rank, t in enumerate(tiles(heads if of_token else steps.max_tokens * heads, target, topk > 0, block_l, block_r, q_latent.dtype.itemsize)):
        numbered = ((tokens, 1), (heads, t.m)) if of_token else (tiles_of(tokens, seqs, t.m, heads), (1, 1))
        programs = (steps.max_seqs if exact else steps.max_tokens) * -(-heads // t.m) if of_token else steps.max_tokens * heads // t.m + steps.max_seqs
        constants: dict[str, Any] = {
            "H": heads, "L": width, "R": r, "PAGE": page_size, "TOPK": topk, "SCALE": args["scale"], "WINDOW": args["window"], "BLOCK_M": t.m, "BLOCK_N": t.n,
            "BLOCK_L": block_l, "BLOCK_R": block_r, "BLOCK_S": power_of_two(steps.max_seqs + 1), "BLOCK_K": power_of_two(topk), "EXACT": exact,
            "SWAP": t.swap, "THREADS": 32 * t.warps, "PRECISION": _precision(q_latent.dtype),
        }  # fmt: skip
        for splits in [1] if steps.deterministic else _splits(programs):
            grid = (*numbered, (splits, 1))
            functions = [mla_attention_kernel, tile_of, place_of, prefetch_rows]
            name = f"{'tokens' if of_token else 'ragged'}_{t}"
            if splits == 1:
                one = launch(call, functions, inputs | {"out": Operand(out=0)} | sizes, constants | {"lse": None, "SPLITS": 1}, grid,
                             num_warps=t.warps, num_stages=t.stages)  # fmt: skip
                found.append(Candidate(name, (one,), rank=rank))
                continue
            parts = product(tokens, heads * splits)
            scratch = (Tensor(torch.float32, (parts, width)), Tensor(torch.float32, (parts,)))
            operands = inputs | {"out": Operand(scratch=0), "lse": Operand(scratch=1)} | sizes
            first = launch(call, functions, operands, constants | {"SPLITS": splits}, grid, scratch=scratch, num_warps=t.warps, num_stages=t.stages)
            combined = {"partial": Operand(scratch=0), "lse": Operand(scratch=1), "sinks": Operand(arg="sinks"), "out": Operand(out=0)}
            small = {"H": heads, "F": width, "SPLITS": splits, "BLOCK_F": block_l}
            second = launch(call, [combine_kernel, combine], combined, small, ((tokens, 1), (heads, 1)), scratch=scratch,
                            num_warps=max(4, min(16, splits * block_l // 1024)))  # fmt: skip
            found.append(Candidate(f"{name}_split{splits}", (first, second), scratch, rank))
    return found


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
                     "PREFETCH": ahead, "THREADS": 32 * warps, "PRECISION": _precision(x.dtype)}  # fmt: skip
        one = launch(call, [head_linear_kernel, prefetch_rows], operands, constants, ((tokens, block_m), (width, block_n), (heads, 1)),
                     num_warps=warps, num_stages=stages)  # fmt: skip
        name = f"m{block_m}_n{block_n}_k{block_k}_w{warps}_s{stages}"
        found.setdefault(name, Candidate(name, (one,), rank=rank))
    return list(found.values())


@claims("latent_write", "triton")
def latent_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    latent, rope = call.args["latent"], call.args["rope"]
    if not supported(call, target):
        return []
    tokens, width = latent.shape
    r = 0 if rope is None else rope.shape[1]
    operands = {n: Operand(arg=n) for n in ("latent", "rope", "latent_cache", "slot_mapping")}
    constants = {"L": width, "R": r, "BLOCK_L": power_of_two(width), "BLOCK_R": power_of_two(r)}
    return [Candidate("tokens", (launch(call, [latent_write_kernel], operands, constants, ((tokens, 1),), num_warps=2),))]


@claims("latent_rope_write", "triton")
def latent_rope_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    if not supported(call, target):
        return []
    (tokens, heads, nope), width, r = call.results[0].shape, args["weight"].shape[0], call.results[1].shape[2]
    operands = {n: Operand(arg=n) for n in ("q", "kv", "cos", "sin", "weight", "latent_cache", "slot_mapping")}
    operands |= {"straight": Operand(out=0), "turned": Operand(out=1)}
    (q_begin, q_step), (r_begin, r_step) = args["straight"], args["turned"]
    constants = {"Q": args["q"].shape[1], "Q_BEGIN": q_begin, "Q_STEP": q_step, "R_BEGIN": r_begin, "R_STEP": r_step, "KV": args["kv"].shape[1],
                 "KV_BEGIN": args["kv_begin"], "H": heads, "NOPE": nope, "L": width, "R": r, "EPS": args["eps"], "OFFSET": args["offset"],
                 "BLOCK_N": power_of_two(nope), "BLOCK_L": power_of_two(width), "BLOCK_R": power_of_two(r)}  # fmt: skip
    constants |= style_constants(args["style"], args["cos"].shape[-1])
    found: dict[str, Candidate] = {}
    for rank, size in enumerate((1024, 4096) if steps.max_tokens <= 64 else (4096, 1024)):  # few tokens need many small programs
        block_h = min(power_of_two(heads), max(1, size // power_of_two(nope + r)))
        grid = ((tokens, 1), (plus(block_h, heads), block_h))
        one = launch(call, [latent_rope_write_kernel, rotation], operands, constants | {"BLOCK_H": block_h}, grid)
        found.setdefault(f"h{block_h}", Candidate(f"h{block_h}", (one,), rank=rank))
    return list(found.values())


LISTS = 2 * PROGRAMS
"""Programs that choose for the tokens of a step with many, one after the other: each has a list."""


@claims("sparse_index", "triton")
def sparse_index(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    q, index_cache = call.args["q"], call.args["index_cache"]
    if not supported(call, target) or q.dtype not in FLOATS or q.dtype != index_cache.dtype:
        return []
    (tokens, j, d), topk = q.shape, call.args["topk"]
    seqs, columns = call.args["page_table"].shape
    exact = steps.exact and steps.max_num_new == 1
    splits = min(8, most_splits(steps.max_seqs)) if exact else 1
    programs = product(tokens, splits) if exact else LISTS
    # Triton 3.6 fails on sm_100 where tensor memory holds the scores: there 32 rows, which are too few for it
    block_n = 16 if q.dtype == torch.float32 else 32 if target.arch == 100 else 128
    block_k = power_of_two(topk)
    of_list = {"TOPK": topk, "BLOCK_K": block_k, "LIST": power_of_two(topk + block_n), "SPLITS": splits}
    constants = of_list | {"J": j, "D": d, "PAGE": index_cache.shape[2], "SCALE": call.args["scale"], "BLOCK_J": max(16, power_of_two(j)),
                           "BLOCK_D": max(16, power_of_two(d)), "BLOCK_N": block_n, "BLOCK_S": power_of_two(steps.max_seqs + 1), "EXACT": exact,
                           "PRECISION": _precision(q.dtype)}  # fmt: skip
    given = {n: Operand(arg=n) for n in ("q", "weights", "index_cache", "cu_seqlens_q", "seq_lens", "page_table")}
    lists = {n: Operand(scratch=i) for i, n in enumerate(("keys", "places", "counts"))}
    scratch = (Tensor(torch.int32, (programs, of_list["LIST"])), Tensor(torch.int32, (programs, of_list["LIST"])), Tensor(torch.int32, (programs,)))
    out = {"out": Operand(out=0)}
    sizes = {"num_tokens": Operand(size=tokens), "num_seqs": Operand(size=seqs), "num_columns": Operand(size=columns)}
    grid = ((tokens if exact else LISTS, 1), (splits, 1))
    launches: list[Launch] = [launch(call, [sparse_index_kernel, prune, best, all_of_few, key_of, place_of], given | lists | out | sizes, constants, grid,
                                     scratch=scratch, num_warps=8, num_stages=3)]  # fmt: skip
    if splits > 1:
        merged = lists | {"seq_lens": given["seq_lens"]} | out
        launches.append(launch(call, [merge_lists_kernel, best, all_of_few], merged, of_list, ((tokens, 1),), scratch=scratch, num_warps=32))
    return [Candidate(f"lists{splits}", tuple(launches), scratch)]
