"""CUDA graphs of plans, or of their first entries: captured before ready, replayed with one call a step."""

from __future__ import annotations

from typing import Any

import torch

from .bind import BoundPlan


def capture(plan: BoundPlan, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Run the plan once, so that libraries make their handles, then capture it: a replay reads and writes what the plan does.

    `pool` (torch.cuda.graph_pool_handle) and `stream` are shared between captures: cuBLAS has a workspace of 32 MiB for each stream.
    """
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        plan.run()
        stream.synchronize()
        graph.capture_begin(pool)  # torch.cuda.graph would empty the allocator's cache each time
        plan.run()
        graph.capture_end()
    return graph
