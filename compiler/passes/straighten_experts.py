"""Experts that a checkpoint holds transposed, or with gate and up side by side, are packed as kernels read best: rows that lie together, gate | up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ingot.ops import Graph, InputSpec, Recipe, Weight
from ingot.ops.target import Target

from ..from_function import from_function
from .match import argument, calls, drop_unused, ingot

_LAID_OUT = {ingot.grouped_linear.default: ("weight",), ingot.moe.default: ("w_in", "b_in", "w_out")}


def straighten_experts(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    for node in list(graph.fx.nodes):
        if not calls(node, *_LAID_OUT):
            continue
        given = [argument(node, n) for n in _LAID_OUT[node.target]]
        turned, paired = argument(node, "transposed"), calls(node, ingot.moe.default) and argument(node, "interleaved")
        if not (turned or paired) or any(w is not None and (w.name not in graph.weights or len(w.users) > 1) for w in given):
            continue
        names = [a.name for a in node.target._schema.arguments]
        arguments = list(node.args)
        for name, weight in zip(_LAID_OUT[node.target], given, strict=True):
            if weight is not None:
                arguments[names.index(name)] = _straight(graph, weight, turned and name != "b_in", paired and name != "w_out")
        arguments[names.index("transposed")] = False
        if paired:
            arguments[names.index("interleaved")] = False
        node.args = tuple(arguments)
    return drop_unused(graph)


def _straight(graph: Graph, node: fx.Node, turned: bool, paired: bool) -> fx.Node:
    """The weight [X, N, K], or bias [X, N], of what is [X, K, N], or has every second row for the up projection."""
    if not turned and not paired:
        return node
    weight = graph.weights[node.name]
    recipe, shape = weight.recipe, weight.shape
    if turned:
        recipe, shape = Recipe("transpose", (1, 2), (recipe,)), (shape[0], shape[2], shape[1])
    if paired:
        x, n, *k = shape
        recipe = Recipe("transpose", (1, 2), (Recipe("reshape", (x, n // 2, 2, math.prod(k)), (recipe,)),))
        recipe = Recipe("reshape", tuple(shape), (recipe,))
    return graph.add_weight(f"{node.name}__rows", Weight(recipe, weight.dtype, tuple(shape)))


def example() -> Graph:
    def fn(x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor, w_out: torch.Tensor) -> list[torch.Tensor]:
        chosen: Any = torch.stack([ids[:, 0] > 0, ids[:, 0] <= 0], 1).long()
        apart = ingot.grouped_linear(x, w, None, chosen[:, 0], True)
        return [apart, ingot.moe(x, chosen, torch.ones_like(ids), w_in, b_in, w_out, None, "silu", True, True, True)]

    f32 = torch.float32
    inputs = {"x": InputSpec(f32, ("T", 6)), "ids": InputSpec(f32, ("T", 2))}
    return from_function(fn, inputs, weights={"w": (f32, (2, 6, 5)), "w_in": (f32, (2, 6, 8)), "b_in": (f32, (2, 8)), "w_out": (f32, (2, 4, 6))})
