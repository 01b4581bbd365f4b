"""Views of a weight become weights of their own: its recipe takes the slice, and the kernel reads it as it lies.

The halves of a latent up-projection and the experts of one tall matrix are such views. A weight that is also read whole, or
whose views would together be larger than it is, stays.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ingot.ops import Graph, InputSpec, Recipe, Weight
from ingot.ops.target import Target

from ..from_function import from_function
from .match import RESHAPES, argument, aten, calls, drop_unused, ingot
from .sink_permutes import PERMUTES, order_of


def fold_weight_views(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    for name in list(graph.weights):
        leaves = _leaves(graph.placeholders[name], graph.weights[name].recipe)
        if leaves and sum(math.prod(n.meta["val"].shape) for n in leaves) <= math.prod(graph.weights[name].shape):
            for i, (node, recipe) in enumerate(leaves.items()):
                weight = Weight(recipe, graph.weights[name].dtype, tuple(int(s) for s in node.meta["val"].shape))
                node.replace_all_uses_with(graph.add_weight(f"{name}__view{i}", weight))
    return drop_unused(graph)


def _leaves(node: fx.Node, recipe: Recipe) -> dict[fx.Node, Recipe] | None:
    """The last views of the chains that start at `node`, each with its recipe; None if something else reads it."""
    found: dict[fx.Node, Recipe] = {}
    for user in node.users:
        viewed = _viewed(user, recipe)
        if viewed is None:
            return None
        further = _leaves(user, viewed) if any(_viewed(u, viewed) is not None for u in user.users) else None
        found |= further if further is not None else {user: viewed}
    return found


def _viewed(node: fx.Node, recipe: Recipe) -> Recipe | None:
    """The recipe of a view of what `recipe` makes; None if `node` is no view that recipes can say."""
    shape = node.meta["val"].shape if isinstance(node.meta.get("val"), torch.Tensor) else ()
    if not shape or not all(isinstance(s, int) for s in shape):
        return None
    if calls(node, *RESHAPES, aten.unsqueeze.default, aten.squeeze.dim):
        return Recipe("reshape", tuple(shape), (recipe,))
    if calls(node, aten.slice.Tensor) and argument(node, "step") == 1:
        source: Any = node.args[0]
        dim = argument(node, "dim") % len(shape)
        begin = argument(node, "start") or 0
        begin = begin + source.meta["val"].shape[dim] if begin < 0 else begin
        return Recipe("slice", (dim, begin, begin + shape[dim]), (recipe,))
    if calls(node, *PERMUTES):
        moved = [d for d, place in enumerate(order_of(node)) if d != place]
        return Recipe("transpose", tuple(moved), (recipe,)) if len(moved) == 2 else None
    return None


def example() -> Graph:
    def fn(x: torch.Tensor, up_weight: torch.Tensor) -> list[torch.Tensor]:
        heads = up_weight.view(3, 12, 16)
        return [ingot.head_linear(ingot.head_linear(x, heads[:, :8].transpose(1, 2)), heads[:, 8:])]

    f32 = torch.float32
    return from_function(fn, {"x": InputSpec(f32, ("T", 3, 8))}, weights={"up_weight": (f32, (36, 16))})
