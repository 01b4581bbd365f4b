"""A linear whose columns lie group by group, parts of each group side by side (Qwen3-Next's q, k, v and z of a key head), gets them part by part.

Its weight's rows are put in that order when it is packed: a part is then a range of columns, and so are parts that are joined again.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ingot.ops import Graph, InputSpec, Recipe, Weight
from ingot.ops.target import Target

from ..from_function import from_function
from ..quantization import signature
from .match import RESHAPES, aten, calls, drop_unused, ingot, last_dim, only_user

SPLITS = (aten.split_with_sizes.default, aten.split.sizes, aten.split.Tensor, aten.chunk.default)


def ungroup_columns(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    for node in list(graph.fx.nodes):
        if calls(node, ingot.linear.default) and (split := _grouped(graph, node)) is not None:
            _ungroup(graph, node, split)
    return drop_unused(graph)


def _grouped(graph: Graph, linear: fx.Node) -> fx.Node | None:
    """The split of [T, groups, columns] that alone reads what a linear gives, whose weight nobody else has and no format has packed."""
    grouped = only_user(linear)
    if not calls(grouped, *RESHAPES) or grouped.meta["val"].dim() != 3 or not isinstance(grouped.meta["val"].shape[2], int):  # type: ignore[union-attr]
        return None
    split = only_user(grouped)  # type: ignore[arg-type]
    if not calls(split, *SPLITS) or not last_dim(split):  # type: ignore[arg-type]
        return None
    mine = [w for w in linear.args[1:] if w is not None]
    alone = all(w.name in graph.weights and len(w.users) == 1 for w in mine) and signature(graph, linear.args[1]) is None  # type: ignore[union-attr, arg-type]
    return split if alone else None


def _ungroup(graph: Graph, linear: Any, split: Any) -> None:
    sizes = [v.shape[2] for v in split.meta["val"]]
    groups = linear.meta["val"].shape[1] // sum(sizes)
    widths = [groups * w for w in sizes]
    linear.args = (linear.args[0], *(None if w is None else _reordered(graph, w, groups, sizes) for w in linear.args[1:]))
    parts = sorted((u for u in split.users if calls(u, operator.getitem)), key=lambda u: u.args[1])
    with graph.fx.inserting_after(linear):
        flat = graph.call(aten.split_with_sizes.default, linear, widths, -1)
    for part in parts:
        with graph.fx.inserting_before(part):
            mine = graph.getitem(flat, part.args[1])
            again = graph.call(aten.reshape.default, mine, [-1, groups, sizes[part.args[1]]])
        for user in [u for u in part.users if calls(u, *RESHAPES) and list(u.meta["val"].shape[1:]) == [widths[part.args[1]]]]:
            user.replace_all_uses_with(mine)
        part.replace_all_uses_with(again)
    for user in list(flat.users):
        for joined in [u for u in user.users if calls(u, aten.cat.default)]:
            _take_together(graph, linear, flat, widths, joined)


def _reordered(graph: Graph, node: fx.Node, groups: int, sizes: list[int]) -> fx.Node:
    weight = graph.weights[node.name]
    rest = weight.shape[1:]
    grouped = Recipe("reshape", (groups, sum(sizes), *rest), (weight.recipe,))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [Recipe("slice", (1, end - size, end), (grouped,)) for size, end in zip(sizes, ends, strict=True)]
    flat = [Recipe("reshape", (groups * size, *rest), (part,)) for size, part in zip(sizes, parts, strict=True)]
    return graph.add_weight(f"{node.name}__parts", Weight(Recipe("cat", (0,), tuple(flat)), weight.dtype, weight.shape))


def _take_together(graph: Graph, linear: fx.Node, flat: Any, widths: list[int], joined: Any) -> None:
    """A `cat` of parts that lie side by side now is a range of columns."""
    given, dim = joined.args[0], joined.args[1] if len(joined.args) > 1 else 0
    if dim not in (1, -1) or not all(calls(g, operator.getitem) and g.args[0] is flat for g in given):
        return
    first = given[0].args[1]
    if [g.args[1] for g in given] != list(range(first, first + len(given))):
        return
    with graph.fx.inserting_before(joined):
        begin = sum(widths[:first])
        whole = graph.call(aten.slice.Tensor, linear, 1, begin, begin + sum(widths[first : first + len(given)]))
    joined.replace_all_uses_with(whole)


def example() -> Graph:
    def fn(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        q, k, v = ingot.linear(x, w, b).reshape(-1, 3, 10).split_with_sizes([2, 2, 6], -1)
        return [torch.cat([q.reshape(-1, 6), k.reshape(-1, 6)], 1), v * 2.0]

    f32 = torch.float32
    return from_function(fn, {"x": InputSpec(f32, ("T", 24))}, weights={"w": (f32, (30, 24)), "b": (f32, (30,))})
