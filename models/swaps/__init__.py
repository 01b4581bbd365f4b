"""Swaps: how pieces of transformers' modeling code become ops of the dialect, one file for each kind of piece.

A swap sees two runs of the model. The first carries shapes alone: the swap's *observers* record how a function or module
is called. Then it compares what it saw with the dialect op on random inputs of those shapes, and its *patches*, in force
while the graph is traced, replace what matched. What did not match stays as transformers wrote it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

TOLERANCE = 1e-4
"""Largest difference, relative to the largest element, at which a module in float32 still equals a dialect op."""


class Patch(NamedTuple):
    """`owner.name` becomes `value`."""

    owner: Any
    name: str
    value: Any


class Swap:
    """One kind of piece. The default observes nothing and patches nothing."""

    def observers(self) -> list[Patch]:
        """Patches for the run of shapes."""
        return []

    def patches(self) -> list[Patch]:
        """Patches for the trace."""
        return []


@contextmanager
def patched(patches: Iterable[Patch]) -> Iterator[None]:
    """Keep the patches in force; on the way out each owner gets back exactly what it had."""
    saved = []
    try:
        for owner, name, value in patches:
            saved.append((owner, name, vars(owner).get(name), name in vars(owner)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value, was_own in reversed(saved):
            if was_own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


def modeling_files(model: torch.nn.Module) -> list[ModuleType]:
    """The Python modules that define the model's classes."""
    names = dict.fromkeys(type(m).__module__ for m in model.modules() if type(m).__module__.startswith("transformers.models."))
    return [sys.modules[n] for n in names]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results have the same shape and differ by at most TOLERANCE."""
    return a.shape == b.shape and bool((a.float() - b.float()).abs().max() <= TOLERANCE * b.float().abs().max())
