"""A residual sum that is normalized next becomes `add_rms_norm`: one pass over the rows writes both."""

from __future__ import annotations

import torch
from torch import fx

from ingot.ops import Graph, InputSpec
from ingot.ops.target import Target

from ..from_function import from_function
from .match import aten, calls, drop_unused, ingot, same_shape


def fuse_add_norm(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    order = {n: i for i, n in enumerate(graph.fx.nodes)}
    for norm in list(graph.fx.nodes):
        if not calls(norm, ingot.rms_norm.default):
            continue
        total = norm.args[0]
        if not calls(total, aten.add.Tensor) or total.kwargs or not all(isinstance(a, fx.Node) for a in total.args) or not same_shape(*total.args):
            continue
        if len({a.meta["val"].dtype for a in (*total.args, total)}) > 1 or any(order[u] < order[norm] for u in total.users):
            continue
        with graph.fx.inserting_before(norm):
            pair = graph.call(ingot.add_rms_norm.default, *total.args, *norm.args[1:])
            normalized, new_total = graph.getitem(pair, 0), graph.getitem(pair, 1)
        norm.replace_all_uses_with(normalized)
        graph.fx.erase_node(norm)
        total.replace_all_uses_with(new_total)
        graph.fx.erase_node(total)
    return drop_unused(graph)


def example() -> Graph:
    def fn(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        total = residual + x
        return [ingot.rms_norm(total, w, 1e-6, 1.0), total]

    f32 = torch.float32
    return from_function(fn, {"x": InputSpec(f32, ("T", 24)), "residual": InputSpec(f32, ("T", 24))}, weights={"w": (f32, (24,))})
