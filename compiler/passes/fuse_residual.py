"""x Wᵀ + b + residual becomes `linear_add`: the residual joins in the linear's epilogue and is never written twice."""

from __future__ import annotations

import torch
from torch import fx

from ingot.ops import Graph, InputSpec
from ingot.ops.target import Target

from ..from_function import from_function
from .match import aten, calls, drop_unused, ingot, replace, same_shape


def fuse_residual(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    for node in list(graph.fx.nodes):
        if not calls(node, aten.add.Tensor) or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            continue
        for linear, residual in (node.args, node.args[::-1]):
            if calls(linear, ingot.linear.default) and len(linear.users) == 1 and same_shape(linear, residual) and _same_dtype(node, linear, residual):
                with graph.fx.inserting_before(node):
                    replace(graph, node, graph.call(ingot.linear_add.default, *linear.args, residual))
                break
    return drop_unused(graph)


def _same_dtype(*nodes: fx.Node) -> bool:
    return len({n.meta["val"].dtype for n in nodes}) == 1


def example() -> Graph:
    def fn(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        return [residual + ingot.linear(x, w, b)]

    f32 = torch.float32
    inputs = {"x": InputSpec(f32, ("T", 24)), "residual": InputSpec(f32, ("T", 16))}
    return from_function(fn, inputs, weights={"w": (f32, (16, 24)), "b": (f32, (16,))})
