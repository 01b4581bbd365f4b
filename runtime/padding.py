"""The size that a step is computed at. Equal sizes share what was captured or bound, so few of them are better than none to spare."""

from __future__ import annotations

from ingot.artifacts.plan import Variant

from .batch import StepSize

_PARTS = 16
"""Sizes to an octave of T, of steps that are launched: padding costs them 3% at the mean."""


def padded(size: StepSize, variant: Variant) -> StepSize:
    """Of a step of `size`, which `variant` takes, on a GPU.

    T is the next captured one, in decode steps S and R as well. Otherwise S is the largest there is, and R a power of two or a
    multiple of 32: what depends on it is a few launches at the end, and a row of logits is dear.
    """
    captured = next((t for t in variant.capture if t >= size.num_tokens), 0)
    if captured and variant.decodes:
        return size._replace(num_tokens=captured, num_seqs=captured, num_rows=captured)
    unit = max(1, (1 << (size.num_tokens - 1).bit_length()) // 2 // _PARTS)
    num_tokens = captured or min(-(-size.num_tokens // unit) * unit, variant.max_tokens)
    rows = size.num_rows if size.num_rows < 2 else 1 << (size.num_rows - 1).bit_length() if size.num_rows <= 32 else -(-size.num_rows // 32) * 32
    return size._replace(num_tokens=num_tokens, num_seqs=min(num_tokens, variant.max_seqs), num_rows=min(rows, variant.max_rows))
