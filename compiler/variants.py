"""Which ranges of steps get a plan of their own."""

from __future__ import annotations

from dataclasses import dataclass

from ingot.ops.kernel import Steps
from ingot.ops.target import Target


def page_size(target: Target) -> int:
    """Tokens of a KV page. On a GPU a block of keys should be one or two pages: its addresses are then nearly free."""
    return 64 if target.kind == "cuda" else 16


@dataclass(frozen=True)
class VariantSpec:
    """A variant before it is planned."""

    name: str
    steps: Steps
    capture: tuple[int, ...] = ()  # `plan.Variant.capture`


def variants(target: Target, max_num_seqs: int, max_num_batched_tokens: int, deterministic: bool) -> list[VariantSpec]:
    """Smallest first; a step takes the first that it fits.

    On a GPU, steps of up to `LAST_CAPTURED` tokens are padded to a bucket and replayed as a CUDA graph: launching their kernels
    one by one takes longer than they run. On a CPU nothing is padded: a variant is a range of T for which the same kernels are best.
    Deterministic steps are one variant, so that the same kernels compute all of them.
    """
    specs = []
    if deterministic:
        ranges = [max_num_batched_tokens]
    elif target.kind == "cuda":
        for n in decode_buckets(max_num_seqs):
            specs.append(VariantSpec(f"decode_{n}", Steps(n, n, 1, n, True, page_size(target), deterministic), (n,)))
        ranges = [n for n in (64, LAST_CAPTURED) if n < max_num_batched_tokens] + [max_num_batched_tokens]
    else:
        ranges = [n for n in (1, 4, 16) if n < max_num_batched_tokens] + [max_num_batched_tokens]
    before = 0
    for n in ranges:
        rows = min(n, max(max_num_seqs, MAX_PROMPT_ROWS))
        captured = tuple(t for t in token_buckets(min(n, LAST_CAPTURED)) if before < t) if target.kind == "cuda" and before < LAST_CAPTURED else ()
        specs.append(VariantSpec(f"tokens_{n}", Steps(n, min(n, max_num_seqs), n, rows, False, page_size(target), deterministic), captured))
        before = n
    return specs


def embed_variants(target: Target, max_num_seqs: int, max_num_batched_tokens: int, deterministic: bool) -> list[VariantSpec]:
    """Of an encoder, smallest first. Its steps are whole texts, of all lengths, launched as they are; there are no rows of logits."""
    ranges = [n for n in ((64, 1024) if target.kind == "cuda" else (16, 128)) if n < max_num_batched_tokens] + [max_num_batched_tokens]
    return [VariantSpec(f"embed_{n}", Steps(n, min(n, max_num_seqs), n, 1, False, page_size(target), deterministic)) for n in ranges]


def rows_variant(name: str, rows: int) -> VariantSpec:
    """Of an entry point over up to `rows` rows of logits."""
    return VariantSpec(name, Steps(rows, rows, 1, rows, False))


LAST_CAPTURED = 1024
"""Tokens of the largest step with a CUDA graph. A larger one runs longer on any GPU than the host takes to launch it."""
MAX_PROMPT_ROWS = 512
"""Logits rows of one step: prompt log-probabilities take a row a token, and a row is a vocabulary wide."""


def decode_buckets(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 32, then every 32 up to `max_num_seqs`: padding wastes little where a step is long."""
    buckets = [n for n in (1, 2, 4, 8, 16) if n < max_num_seqs]
    return [*buckets, *range(32, max_num_seqs, 32), max_num_seqs]


def token_buckets(last: int) -> list[int]:
    """Of steps with prompts: 16, 32, 64, 96, 128, then four to an octave, up to `last`."""
    buckets = [16, 32, 64, 96, 128]
    while buckets[-1] < last:
        buckets.append(buckets[-1] + (1 << (buckets[-1].bit_length() - 3)))
    return [n for n in buckets if n < last] + [last]
