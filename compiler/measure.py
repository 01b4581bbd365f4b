"""How long kernels take, the way that they will be run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ingot.artifacts import gate
from ingot.artifacts.bound import Loaded
from ingot.ops.kernel import Call, Candidate, Steps

CONTEXTS = (1024, 192)
"""Cached tokens of the longest sequence where attention of a decode step is timed: on long ones memory decides, on short ones latency."""
SKEWED = (8192, 192)
"""Cached tokens of one sequence, and of the others at most, in a third such step: none of the others should wait for the one."""
PROMPTS = (1, 3)
"""Sequences of a step with prompts, which have no cached tokens: one that fills it has other work for each tile than several."""
MAX_COPIES = 15
"""Of a call's inputs while it is timed; calls so small that these fit in a cache are timed by their latency, not by memory."""
LONG, WARM = 1e-3, 0.25
"""Seconds of a kernel that is long, and of the work after which such ones are compared: as in a prompt of that length, a GPU has come to what its power allows.
Products of 8,192 rows take 8 to 15% longer then than at first, and not all of them as much (H100)."""
MAX_SHARE = 64
"""Of the device's memory, the part that a call's inputs may take so that each layer has its own: all calls of a layer have theirs at once."""


class Stopwatch:
    """Times candidates of one call on the variant's largest step, on copies of its inputs; what depends on sequences in several situations of them.

    There are enough copies that a GPU's cache cannot hold them all: in a step, it holds another layer's. Results lie in arguments where they may,
    as they do in a plan: a residual grows from run to run, which takes no longer.
    """

    def __init__(self, call: Call, steps: Steps, device: torch.device, layers: int = 1) -> None:
        """`layers`: as many copies, if they are not too large, as if each were a layer's."""
        self._call, self._device, self._layers = call, device, layers
        self.warms = device.type == "cuda"  # whether it matters how long the device has worked
        if "page_table" not in call.args:
            situations = [{"context": 0}]
        elif steps.max_num_new == 1:
            situations = [{"context": c} for c in CONTEXTS]
            situations += [{"context": SKEWED[0], "others": SKEWED[1]}] if steps.max_seqs > 1 else []
        else:
            situations = [{"context": 0, "prompts": n} for n in PROMPTS]
        self._situations = [self._copied(*gate.arguments(call, steps, device, steps.max_tokens, seed=1, **s)) for s in situations]

    def _copied(self, inputs: dict[str, Any], sizes: dict[str, int]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        copies = 0
        if self._device.type == "cuda":
            card, nbytes = torch.cuda.get_device_properties(self._device), sum(v.nbytes for v in inputs.values() if isinstance(v, torch.Tensor))
            copies = copies_of(max(nbytes, 1), card.L2_cache_size, card.total_memory, self._layers)
        return [inputs, *({n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()} for _ in range(copies))], sizes

    def seconds(self, candidate: Candidate, kernels: Sequence[Loaded | None], warm: float = 0.0) -> float:
        """Of one run, the geometric mean of the situations: what a short one loses counts as much as what a long one does. `kernels`: one a launch, None for
        library calls. `warm`: seconds of work before, on a GPU."""
        timed = self.runs(candidate, kernels)
        return statistics.geometric_mean(cuda_seconds(runs, warm) if self._device.type == "cuda" else _cpu_seconds(runs[0]) for runs in timed)

    def runs(self, candidate: Candidate, kernels: Sequence[Loaded | None]) -> list[list[Callable[[], object]]]:
        """In each situation, one for each copy of the inputs."""
        return [[gate.bind(candidate, self._call, inputs, sizes, kernels, inplace=True)[1] for inputs in copies] for copies, sizes in self._situations]


def copies_of(nbytes: int, cache: int, memory: int, layers: int) -> int:
    """How many of inputs, beside themselves: that the cache of a device cannot hold them, and for each of some layers if its memory lets them be."""
    return max(min(math.ceil(2 * cache / nbytes), MAX_COPIES), min(layers - 1, memory // MAX_SHARE // nbytes))


def cuda_seconds(runs: Sequence[Callable[[], object]], warm: float = 0.0) -> float:
    """Median time of one of `runs` in a CUDA graph of at least ten, since that is how they will be replayed, when the device has done it for `warm` seconds."""
    count = max(10, len(runs))
    return graph_seconds([runs[i % len(runs)] for i in range(count)], warm) / count


def graph_seconds(runs: Sequence[Callable[[], object]], warm: float = 0.0) -> float:
    """Median time of all `runs`, one after the other in a CUDA graph, when the device has done it for `warm` seconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        runs[0]()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()  # torch.cuda.graph would empty the allocator's cache first
        for run in runs:
            run()
        graph.capture_end()
    for _ in range(math.ceil(warm / event_seconds(graph.replay, 1)) if warm else 0):
        graph.replay()
    return event_seconds(graph.replay)


def event_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median time that the device takes for what `run` enqueues."""
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def _cpu_seconds(run: Callable[[], None], budget: float = 0.01) -> float:
    """Median time over repetitions worth about `budget` seconds."""
    run()
    times: list[float] = []
    while sum(times) < budget and len(times) < 50:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
