"""Which of the cached keys of which sequence an item of a decode step's work has.

A sequence has SPLITS parts of its own. One that is much longer than the others has more, for which there are EXTRA items: so nobody waits for it. Each program
finds its part from the lengths alone, and a step of other lengths is the same CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..kernel import Steps
from .attention import PROGRAMS, most_splits

ENOUGH = 8
"""Parts of its own with which a sequence needs no more, however long it is."""
FEWEST = 256
"""Keys that one program may have, whatever the others have."""


def splits_of(steps: Steps, kv_heads: int) -> list[int]:
    """SPLITS to choose from: four times as many programs as fill the GPU, so that those of one multiprocessor even out; a half, or a quarter of that."""
    most = most_splits(steps.max_seqs * kv_heads, 4 * PROGRAMS)
    return [s for s in (most, most // 2, most // 4) if s > 0]


def extra_items(steps: Steps, kv_heads: int, splits: int) -> int:
    """EXTRA: half as many items as all sequences have of their own, or as keep the GPU busy alone. None where a sequence's result must not depend on the
    others, nor where each has so many parts that the longest is soon done: looking for more only costs."""
    if steps.deterministic or steps.max_seqs == 1 or splits >= ENOUGH:
        return 0
    return min(steps.max_seqs * splits // 2, 2 * PROGRAMS // kv_heads)


@triton.jit
def cached(length, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """(first, number after the last) of the cached keys that the newest token of a sequence of `length` sees."""
    high = tl.maximum(length - 1, 0)
    low = high * 0
    if WINDOW > 0:
        low = tl.maximum(high - WINDOW + 1, 0)
    if CHUNK > 0:
        low = tl.maximum(low, high // CHUNK * CHUNK)
    return low, high


@triton.jit
def cached_of_all(seq_lens, num_seqs, EXTRA: tl.constexpr, FEWEST: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr):
    """Cached keys of each sequence [BLOCK_S], and how many of them a part has at most, so that EXTRA parts would do for all: a multiple of 16, and at least
    FEWEST, which need not be split."""
    s = tl.arange(0, BLOCK_S)
    low, high = cached(tl.load(seq_lens + s, mask=s < num_seqs, other=0), WINDOW, CHUNK)
    keys = high - low
    return keys, tl.maximum(((tl.sum(keys) + EXTRA - 1) // EXTRA + 15) // 16 * 16, FEWEST)


@triton.jit
def extra_parts(keys, most, token, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of each sequence [BLOCK_S] the number of parts beyond its own SPLITS, where a part has at most `most` keys; and of those of all before `token`."""
    more = tl.maximum((keys + most - 1) // most - SPLITS, 0)
    return more, tl.sum(tl.where(tl.arange(0, BLOCK_S) < token, more, 0))


@triton.jit
def part_of(item, seq_lens, num_seqs, SPLITS: tl.constexpr, EXTRA: tl.constexpr, FEWEST: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
            BLOCK_S: tl.constexpr):  # fmt: skip
    """(sequence, its length, which part of it, how many it has, the part's first key and the one after its last) of an item; nothing to do if it has no
    such part.

    The first EXTRA items are for sequences that are longer than SPLITS parts may be; after them, each sequence has SPLITS items of its own.
    """
    own = item - EXTRA
    token = own // SPLITS
    part = own % SPLITS
    length = tl.load(seq_lens + token, mask=own >= 0, other=0)
    low, high = cached(length, WINDOW, CHUNK)
    most = 1 << 30
    if EXTRA > 0:  # noqa: SIM102 (decided when this is compiled)
        if (own < 0) | (high - low > SPLITS * FEWEST):
            keys, most = cached_of_all(seq_lens, num_seqs, EXTRA, FEWEST, WINDOW, CHUNK, BLOCK_S)
            if own < 0:
                part = SPLITS
                if tl.max(keys) > SPLITS * most:
                    more, _ = extra_parts(keys, most, 0, SPLITS, BLOCK_S)
                    token = tl.sum((tl.cumsum(more, 0) <= item).to(tl.int32))
                    part += item - tl.sum(tl.where(tl.arange(0, BLOCK_S) < token, more, 0))
                    length = tl.load(seq_lens + token, mask=token < num_seqs, other=0)
                    low, high = cached(length, WINDOW, CHUNK)
    share = tl.minimum(((high - low + SPLITS - 1) // SPLITS + 15) // 16 * 16, most)
    count = tl.maximum((high - low + share - 1) // tl.maximum(share, 1), 1)
    low += part * share
    return token, length, part, count, low, tl.minimum(high, low + share)
