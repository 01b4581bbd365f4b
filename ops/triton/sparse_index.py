"""The positions that a token of sparse attention sees: those of the best scores, chosen from a list that is pruned whenever it is full."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dims import product
from ..kernel import Call, Candidate, Launch, Operand, Steps, Tensor, claims
from ..target import Target
from .attention import PROGRAMS, most_splits
from .ragged import place_of
from .sampling import key_of
from .source import FLOATS, launch, power_of_two, supported


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
                           "PRECISION": "ieee" if q.dtype == torch.float32 else None}  # fmt: skip
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
