"""How long a kernel takes on a GPU, the way that it will be run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def seconds(runs: Sequence[Callable[[], None]]) -> float:
    """Median time of one of `runs`, which do the same on different memory, in a CUDA graph of at least ten, since that is how they will be replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        runs[0]()
    stream.synchronize()
    count = max(10, len(runs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            runs[i % len(runs)]()
    times = []
    for _ in range(5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / count)
    return statistics.median(times)
