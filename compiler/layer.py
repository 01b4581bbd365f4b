"""Kernels that are fastest together: what was fastest alone is tried once more among the others of its layer.

In a step a kernel overlaps with its neighbours. One asks for its weights while the one before ends; another fills the multiprocessors, so that the next cannot
begin to; what finishes early and what leaves room are not seen when a kernel follows itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import geometric_mean

from ingot.ops.kernel import Steps
from ingot.ops.target import Target

from .measure import graph_seconds

LAYERS = 8
"""One after the other in what is timed: a step's end and beginning should count for little."""
NEAR = 1.25
"""Candidates that took at most so many times as long as the fastest alone are tried."""
MOST = 5
"""So many of each call."""
GAIN = 0.004
"""Of a layer's time that another candidate must spare, or else it is noise."""

Runs = Sequence[Sequence[Callable[[], object]]]
"""A candidate in each situation that it is timed in (one, where sequences' lengths do not matter), bound to one copy of its inputs after the other."""


def layer_of(names: Sequence[str]) -> range:
    """Where the calls of a layer in the middle are: from one of those that are most frequent to the next. Empty where no call comes twice."""
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    places = [i for i, n in enumerate(names) if n == name]
    return range(places[count // 2 - 1], places[count // 2]) if count > 1 else range(0)


def near(seconds: Mapping[str, float]) -> list[str]:
    """The candidates to try, fastest first."""
    order = sorted(seconds, key=lambda n: seconds[n])
    return [n for n in order if seconds[n] <= NEAR * seconds[order[0]]][:MOST]


def fastest_together(layer: Sequence[str], runs: Mapping[str, Mapping[str, Runs]]) -> dict[str, str]:
    """The candidate of each call. `layer`: calls in their order; `runs`: of each call the candidates to try, the fastest alone first.

    One call after the other is given another candidate, for good if the layer is faster so, until that is true of none.
    """
    chosen = {name: next(iter(found)) for name, found in runs.items()}
    situations = max(len(r) for found in runs.values() for r in found.values())

    @cache
    def seconds(*candidates: str) -> float:
        """Of the calls of `runs`, in their order."""
        times, of = [], dict(zip(runs, candidates, strict=True))
        for situation in range(situations):
            bound = [found[situation % len(found)] for found in (runs[name][of[name]] for name in layer)]
            times.append(graph_seconds([b[i % len(b)] for i in range(LAYERS) for b in bound]))
        return geometric_mean(times)

    best, changed = seconds(*chosen.values()), True
    while changed:
        changed = False
        for name, found in runs.items():
            for candidate in found:
                if candidate == (before := chosen[name]):
                    continue
                chosen[name] = candidate
                if (now := seconds(*chosen.values())) < best * (1 - GAIN):
                    best, changed = now, True
                else:
                    chosen[name] = before
    return chosen


def overlap(target: Target, steps: Steps) -> bool:
    """Whether kernels run beside each other, and are so short that this decides: in decode steps of a GPU."""
    return target.kind == "cuda" and steps.exact and steps.max_num_new == 1
