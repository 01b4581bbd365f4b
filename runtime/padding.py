"""The size that a step is computed at. Equal sizes share what was captured or bound, so few of them are better than none to spare."""

from __future__ import annotations

from ingot.artifacts.plan import Variant

from .batch import StepSize

_PARTS = 16
"""Sizes to an octave of T, of steps that are launched: padding costs them 3% at the mean."""
FEW_SEQS = 8
"""Sequences that most steps with prompts have at most. Attention looks at a tile of each there might be: of 256 where there is one, that takes longer than the
one's tokens."""


def padded(size: StepSize, variant: Variant) -> StepSize:
    """Of a step of `size`, which `variant` takes, on a GPU.

    T is the next captured one, in decode steps S and R as well. Otherwise S is FEW_SEQS or the largest there is, and R a power of two or a
    multiple of 32: what depends on it is a few launches at the end, and a row of logits is dear.
    """
    captured = next((t for t in variant.capture if t >= size.num_tokens), 0)
    if captured and variant.decodes:
        return size._replace(num_tokens=captured, num_seqs=captured, num_rows=captured)
    unit = max(1, (1 << (size.num_tokens - 1).bit_length()) // 2 // _PARTS)
    num_tokens = captured or min(-(-size.num_tokens // unit) * unit, variant.max_tokens)
    rows = size.num_rows if size.num_rows < 2 else 1 << (size.num_rows - 1).bit_length() if size.num_rows <= 32 else -(-size.num_rows // 32) * 32
    seqs = min(num_tokens, FEW_SEQS if size.num_seqs <= FEW_SEQS else variant.max_seqs, variant.max_seqs)
    return size._replace(num_tokens=num_tokens, num_seqs=seqs, num_rows=min(rows, variant.max_rows))


def captured_sizes(variant: Variant) -> list[StepSize]:
    """Those that a variant's steps are padded to and replayed at, with a row of logits where R is no matter."""
    return list(dict.fromkeys(padded(StepSize(t, s, 1, 0), variant) for t in variant.capture for s in (1, min(t, variant.max_seqs))))
