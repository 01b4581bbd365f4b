"""Sizes of tensors whose step is not known yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Dim = int | dict[str, int]
"""A number, or a linear form over step sizes: `{"T": 2, "": 1}` is 2T + 1.

Step sizes: T tokens, S sequences, R rows that need logits, `P_<group>` columns of a page table, `N_<group>` pages or slots.
"""


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The number that `dim` is when the step has these sizes."""
    if isinstance(dim, int):
        return dim
    return sum(c * (sizes[n] if n else 1) for n, c in dim.items())


def product(a: Dim, b: Dim) -> Dim:
    """a · b; one of them must be a number. ValueError otherwise."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    form, factor = (a, b) if isinstance(b, int) else (b, a)
    if not isinstance(factor, int) or isinstance(form, int):
        raise ValueError(f"{show(a)} · {show(b)} is not linear in the step sizes")
    return {n: c * factor for n, c in form.items()}


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor whose elements lie one after the other. An axis without elements counts as one, as torch has it."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def plus(a: Dim, b: Dim, factor: int = 1) -> Dim:
    """a + factor · b."""
    forms = [x if isinstance(x, dict) else {"": x} for x in (a, product(b, factor))]
    return {n: forms[0].get(n, 0) + forms[1].get(n, 0) for n in (*forms[0], *(m for m in forms[1] if m not in forms[0]))}


def show(dim: Dim) -> str:
    """`2T+1`."""
    if isinstance(dim, int):
        return str(dim)
    return "+".join(f"{c}" if not n else n if c == 1 else f"{c}{n}" for n, c in dim.items())
