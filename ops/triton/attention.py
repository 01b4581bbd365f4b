"""Paged attention: online softmax over blocks of a sequence's pages (Dao et al. 2022), query heads of one kv head packed into one tile.

A program takes a tile of a sequence's new tokens × the query heads of one kv head. Where sequences bring few new tokens
(decode), there is one tile a sequence, and the keys are split over programs whose partial results a second launch
combines (Flash-Decoding, Dao et al. 2023). Otherwise tiles are numbered over the ragged batch, and each program finds
its sequence in `cu_seqlens_q`. Grids depend on the step's sizes alone; what `seq_lens` makes unnecessary is skipped.

A quantized cache is multiplied in float16, which holds its values exactly: scales of keys go to the scores, those of values are taken relative to
the largest so far, and queries are kept within 1, so that nothing overflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..dims import plus, product
from ..kernel import Call, Candidate, Operand, Steps, Tensor, claims
from ..quantize import LARGEST
from ..target import SHARED_MEMORY_BYTES, Target
from .activations import tanh
from .ragged import tile_of, tiles_of
from .source import FLOATS, launch, power_of_two, supported

PROGRAMS = 264
"""Programs that keep a large GPU's memory busy: two a multiprocessor of an H100 or H200."""
MAX_SPLITS = 64


@triton.jit
def attend(h, acc, top, total, unit, size, slope, position, begin, stop, length, page_table, k_cache, v_cache, k_scale, v_scale, kv_head,
           K: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
           SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, MASKED: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Fold keys of blocks `begin` … `stop` − 1 into (acc, top, total); scores are in units of log 2. MASKED: some key may be hidden from some query.

    Of a quantized cache: queries are h · `size`, and acc is in units of `unit`, the largest scale of v so far.
    """
    e = tl.arange(0, BLOCK_E)
    f = tl.arange(0, BLOCK_F)
    for block in range(begin, stop):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        there = n < length if MASKED else n >= 0
        row = (tl.load(page_table + n // PAGE, mask=there, other=0).to(tl.int64) * K + kv_head) * PAGE + n % PAGE
        k = tl.load(k_cache + row[None, :] * E + e[:, None], mask=there[None, :] & (e < E)[:, None], other=0.0).to(h.dtype)
        scores = tl.dot(h, k, input_precision=PRECISION)
        if k_scale is not None:
            scores *= size[:, None] * tl.load(k_scale + row, mask=there, other=0.0)[None, :]
        if SOFTCAP > 0:
            scores = SOFTCAP * 1.4426950408889634 * tanh(scores * (SCALE / SOFTCAP))
        else:
            scores *= SCALE * 1.4426950408889634
        if slope is not None:
            scores += slope[:, None] * (n[None, :] - position[:, None])
        if MASKED:
            seen = n[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (n[None, :] > position[:, None] - WINDOW)
            if CHUNK > 0:
                seen = seen & (n[None, :] // CHUNK == position[:, None] // CHUNK)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # a row that has seen nothing yet keeps −inf: measure it from 0, so that its weights are 0 and not NaN
        origin = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        p = tl.exp2(scores - origin[:, None])
        decay = tl.exp2(top - origin)
        total = total * decay + tl.sum(p, 1)
        v = tl.load(v_cache + row[:, None] * F + f[None, :], mask=there[:, None] & (f < F)[None, :], other=0.0).to(h.dtype)
        if v_scale is not None:
            scale = tl.load(v_scale + row, mask=there, other=0.0)
            larger = tl.maximum(unit, tl.max(scale, 0))
            v *= (scale * (1.0 / larger)).to(h.dtype)[:, None]  # v and not p: so v is widened before it is transposed, and not byte by byte
            decay *= unit * (1.0 / larger)
            unit = larger
        acc = tl.dot(p.to(h.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total, unit


@triton.jit
def attention_kernel(q, k_cache, v_cache, k_scale, v_scale, cu_seqlens_q, seq_lens, page_table, sinks, alibi_slopes, out, lse, num_tokens, num_seqs,
                     num_columns, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, F: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr,
                     WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, DECODE: tl.constexpr,
                     PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """With SPLITS > 1, `out` is [T, H, SPLITS, F] of normalized partial results and `lse` [T, H, SPLITS] their log2-sum-exp2."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    GROUP: tl.constexpr = H // K
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    # the tokens after the last sequence are a sequence of length 0
    if DECODE:
        seq = tile
        start = tl.load(cu_seqlens_q + seq)
        begin = 0
    else:
        seq, start, begin = tile_of(tile, cu_seqlens_q, num_seqs, 1, BLOCK_Q, BLOCK_S)
    queries = tl.load(cu_seqlens_q + seq + 1, mask=seq < num_seqs, other=num_tokens) - start
    length = tl.load(seq_lens + seq, mask=seq < num_seqs, other=0)
    for first in range(begin, queries if DECODE else tl.minimum(queries, begin + 1), BLOCK_Q):
        m = tl.arange(0, BLOCK_M)
        query = first + m // GROUP
        head = kv_head * GROUP + m % GROUP
        row = (start + query).to(tl.int64) * H + head
        valid = (m < BLOCK_Q * GROUP) & (query < queries)
        position = length - queries + query
        e = tl.arange(0, BLOCK_E)
        h = tl.load(q + row[:, None] * E + e[None, :], mask=valid[:, None] & (e < E)[None, :], other=0.0)
        size = None
        if k_scale is not None:
            h = h.to(tl.float32)
            size = tl.maximum(tl.max(tl.abs(h), 1), 1e-30)
            h = (h / size[:, None]).to(tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16)
        slope = None
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
        earliest = length - queries + first
        low = 0
        if WINDOW > 0:
            low = tl.maximum(low, earliest - WINDOW + 1) // BLOCK_N
        if CHUNK > 0:
            low = tl.maximum(low, tl.maximum(earliest, 0) // CHUNK * CHUNK // BLOCK_N)
        high = (tl.minimum(length, earliest + BLOCK_Q) + BLOCK_N - 1) // BLOCK_N
        if SPLITS > 1:
            share = (high - low + SPLITS - 1) // SPLITS
            low += split * share
            high = tl.minimum(high, low + share)
        acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        unit = tl.full([], 1e-30, tl.float32)
        pages = page_table + seq.to(tl.int64) * num_columns
        if WINDOW == 0 and CHUNK == 0:
            middle = tl.maximum(low, tl.minimum(high, (earliest + 1) // BLOCK_N))
            acc, top, total, unit = attend(h, acc, top, total, unit, size, slope, position, low, middle, length, pages, k_cache, v_cache, k_scale, v_scale,
                                           kv_head, K, E, F, PAGE, SCALE, WINDOW, CHUNK, SOFTCAP, BLOCK_N, BLOCK_E, BLOCK_F, False, PRECISION)  # fmt: skip
            low = middle
        acc, top, total, unit = attend(h, acc, top, total, unit, size, slope, position, low, high, length, pages, k_cache, v_cache, k_scale, v_scale,
                                       kv_head, K, E, F, PAGE, SCALE, WINDOW, CHUNK, SOFTCAP, BLOCK_N, BLOCK_E, BLOCK_F, True, PRECISION)  # fmt: skip
        if v_scale is not None:
            acc *= unit
        if SPLITS > 1:
            row = row * SPLITS + split
            tl.store(lse + row, top + tl.log2(total), mask=valid)
        elif sinks is not None:
            sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
            higher = tl.maximum(top, sink)
            decay = tl.exp2(top - higher)
            total = total * decay + tl.exp2(sink - higher)
            acc *= decay[:, None]
        acc /= tl.where(total == 0.0, 1.0, total)[:, None]
        f = tl.arange(0, BLOCK_F)
        tl.store(out + row[:, None] * F + f[None, :], acc.to(out.dtype.element_ty), mask=valid[:, None] & (f < F)[None, :])


@triton.jit
def combine_kernel(partial, lse, sinks, out, H: tl.constexpr, F: tl.constexpr, SPLITS: tl.constexpr, BLOCK_F: tl.constexpr, PDL: tl.constexpr):
    """A head of a token from SPLITS partial results."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * H + head
    f = tl.arange(0, BLOCK_F)
    at = row * SPLITS + tl.arange(0, SPLITS)
    part = tl.load(lse + at)
    top = tl.max(part, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    origin = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(part - origin)
    total = tl.sum(weight, 0)
    if sinks is not None:
        total += tl.exp2(sink - origin)
    values = tl.load(partial + at[:, None] * F + f[None, :], mask=(weight > 0.0)[:, None] & (f < F)[None, :], other=0.0)
    h = tl.sum(values * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * F + f, h.to(out.dtype.element_ty), mask=f < F)


@dataclass(frozen=True)
class Tile:
    """Rows (tokens × grouped heads) and keys of a step of the softmax; warps, pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"m{self.m}_n{self.n}_w{self.warps}_s{self.stages}"

    def shared_bytes(self, e: int, f: int, itemsize: int) -> int:
        """Two stages a block in flight, since page numbers are fetched one ahead of pages; large tiles are multiplied from a block more."""
        blocks = max((self.stages - 1) // 2, 1) + (self.m >= 64)
        return (self.m * (e + self.n) + blocks * self.n * (e + f)) * itemsize


def tiles(rows: int | None, target: Target, group: int, e: int, f: int, itemsize: int) -> list[Tile]:
    """Tiles that fit in shared memory, best first; `rows`: the most rows that a sequence brings, None when they are many."""
    least = max(16, power_of_two(group))
    if rows is not None:
        m = max(least, power_of_two(rows))
        wanted = [Tile(m, 128, 4, 3), Tile(m, 32, 1 if m == 16 else 4, 5), Tile(m, 64, 4, 5), Tile(m, 32, 4, 3)]
    else:
        wanted = [Tile(max(m, least), n, w, s) for m, n, w, s in ((128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 3))]
    if itemsize == 4:  # multiplied without matrix units: large tiles would spill
        wanted = [Tile(max(min(32, t.m), least), 32, 4, 2) for t in wanted[:1]]
    fitting = [t for t in dict.fromkeys(wanted) if t.shared_bytes(e, f, itemsize) <= SHARED_MEMORY_BYTES[target.isa]]
    return fitting[:3] or [Tile(least, 16, 4, 1)]


def most_splits(programs: int, enough: int = PROGRAMS) -> int:
    """Into how many parts the cached tokens of each of `programs` go, those of a variant's largest step, so that there are up to `enough`.

    The parts are all there at any length.
    """
    return min(MAX_SPLITS, 1 << max(1, enough // programs).bit_length() - 1)


@claims("paged_attention", "triton")
def paged_attention(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    q, k_cache, v_cache = args["q"], args["k_cache"], args["v_cache"]
    held = FLOATS if args["k_scale"] is None else LARGEST
    if not supported(call, target) or q.dtype not in FLOATS or any(t.dtype not in held for t in (k_cache, v_cache)):
        return []
    tokens, heads, e = q.shape
    kv_heads, page_size, f = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    group = heads // kv_heads
    seqs, columns = args["page_table"].shape
    block_e, block_f = max(16, power_of_two(e)), max(16, power_of_two(f))
    # a sequence brings few rows: its tile is one, and splitting the keys is what fills the GPU
    decode = steps.max_num_new * group <= 64
    splits = most_splits(steps.max_seqs * kv_heads) if decode else 1
    constants: dict[str, Any] = {
        "H": heads, "K": kv_heads, "E": e, "F": f, "PAGE": page_size, "SCALE": args["scale"], "WINDOW": args["window"], "CHUNK": args["chunk"],
        "SOFTCAP": args["softcap"], "BLOCK_E": block_e, "BLOCK_F": block_f, "BLOCK_S": power_of_two(steps.max_seqs + 1), "SPLITS": splits,
        "DECODE": decode, "PRECISION": "ieee" if q.dtype == torch.float32 else None,
    }  # fmt: skip
    inputs = {n: Operand(arg=n) for n in ("q", "k_cache", "v_cache", "k_scale", "v_scale", "cu_seqlens_q", "seq_lens", "page_table")}
    per_head = {n: Operand(arg=n) for n in ("sinks", "alibi_slopes")}
    sizes = {"num_tokens": Operand(size=tokens), "num_seqs": Operand(size=seqs), "num_columns": Operand(size=columns)}
    scratch: tuple[Tensor, ...] = ()
    outputs = {"out": Operand(out=0)}
    if splits > 1:
        parts = product(tokens, heads * splits)
        scratch = (Tensor(torch.float32, (parts, f)), Tensor(torch.float32, (parts,)))
        outputs = {"out": Operand(scratch=0), "lse": Operand(scratch=1)}
    found = []
    for rank, t in enumerate(tiles(steps.max_num_new * group if decode else None, target, group, block_e, block_f, q.dtype.itemsize)):
        block_q = t.m // group
        numbered = (plus(seqs, 1), 1) if decode else tiles_of(tokens, seqs, block_q)
        blocks = constants | {"BLOCK_M": t.m, "BLOCK_N": t.n} | ({} if splits > 1 else {"lse": None})
        functions = [attention_kernel, tile_of, attend, tanh]
        first = launch(call, functions, inputs | per_head | outputs | sizes, blocks, (numbered, (kv_heads, 1), (splits, 1)),
                       scratch=scratch, num_warps=t.warps, num_stages=t.stages)  # fmt: skip
        launches = [first]
        if splits > 1:
            operands = {"partial": Operand(scratch=0), "lse": Operand(scratch=1), "sinks": Operand(arg="sinks"), "out": Operand(out=0)}
            small = {"H": heads, "F": f, "SPLITS": splits, "BLOCK_F": block_f}
            launches.append(launch(call, [combine_kernel], operands, small, ((tokens, 1), (heads, 1)), scratch=scratch))
        found.append(Candidate(f"{'decode' if decode else 'ragged'}_{t}" + (f"_split{splits}" if splits > 1 else ""), tuple(launches), scratch, rank))
    return found
