"""Multi-head latent attention over the paged cache of latents.

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

from ..dims import product
from ..kernel import Call, Candidate, Operand, Steps, Tensor, claims
from ..target import SHARED_MEMORY_BYTES, Target
from .attention import combine_kernel, most_splits
from .prefetch import prefetch_rows
from .ragged import place_of, tile_of, tiles_of
from .source import FLOATS, launch, power_of_two, supported


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
            "SWAP": t.swap, "THREADS": 32 * t.warps, "PRECISION": "ieee" if q_latent.dtype == torch.float32 else None,
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
            second = launch(call, [combine_kernel], combined, small, ((tokens, 1), (heads, 1)), scratch=scratch,
                            num_warps=max(4, min(16, splits * block_l // 1024)))  # fmt: skip
            found.append(Candidate(f"{name}_split{splits}", (first, second), scratch, rank))
    return found
