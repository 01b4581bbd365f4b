"""CUDA graphs of decode plans: captured before ready, replayed with one call a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .bind import BoundPlan


@dataclass(frozen=True)
class CapturedPlan:
    """A plan as a CUDA graph; it reads the inputs and writes the results of the plan that it was captured from."""

    graph: torch.cuda.CUDAGraph
    results: tuple[torch.Tensor, ...]

    def run(self) -> None:
        self.graph.replay()


def capture(plan: BoundPlan, pool: Any) -> CapturedPlan:
    """Run the plan once, so that libraries make their handles, then capture it. `pool` (torch.cuda.graph_pool_handle) is shared between captures."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plan.run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        plan.run()
    return CapturedPlan(graph, plan.results)
