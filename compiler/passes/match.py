"""Reading a graph backwards: what passes ask of a node."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ingot.ops import Graph, Recipe

aten = torch.ops.aten
ingot = torch.ops.ingot

RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unflatten.int, aten.flatten.using_ints})


def calls(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def only_user(node: fx.Node) -> fx.Node | None:
    """The node's user, when it has one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an op call by its schema name, its default included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    for i, a in enumerate(schema):
        if a.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, a.default_value)
    raise KeyError(f"{node.target} has no argument {name}")


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors have the same symbolic shape."""
    x, y = a.meta["val"].shape, b.meta["val"].shape
    return len(x) == len(y) and all(str(i) == str(j) for i, j in zip(x, y, strict=True))


def through_reshapes(node: Any) -> Any:
    """`node` before reshapes that keep its first dim."""
    while calls(node, *RESHAPES) and str(node.args[0].meta["val"].shape[0]) == str(node.meta["val"].shape[0]):
        node = node.args[0]
    return node


def column_slice(node: fx.Node) -> tuple[fx.Node, int, int]:
    """(base, begin, end): `node` [T, …] holds columns begin…end of base [T, N], seen through reshapes, slices and splits of the last dim."""
    node = through_reshapes(node)
    if calls(node, operator.getitem):
        parent, index = node.args
        if calls(parent, aten.split_with_sizes.default, aten.split.sizes) and last_dim(parent):
            sizes = parent.args[1]
            return _within(parent.args[0], sum(sizes[:index]), sizes[index])
        if calls(parent, aten.chunk.default, aten.split.Tensor) and last_dim(parent):
            widths = [v.shape[-1] for v in parent.meta["val"]]
            return _within(parent.args[0], sum(widths[:index]), widths[index])
    if calls(node, aten.slice.Tensor) and argument(node, "dim") in (node.meta["val"].dim() - 1, -1) and argument(node, "step") == 1:
        begin = argument(node, "start") or 0
        return _within(node.args[0], begin, node.meta["val"].shape[-1])
    width = node.meta["val"].shape[-1]
    return node, 0, int(width) if node.meta["val"].dim() == 2 else 0


def last_dim(node: fx.Node) -> bool:
    """Whether a split is along the last dim."""
    dim = argument(node, "dim")
    return dim in (-1, node.args[0].meta["val"].dim() - 1)  # type: ignore[union-attr]


def _within(base: fx.Node, begin: int, width: int) -> tuple[fx.Node, int, int]:
    if base.meta["val"].dim() != 2:
        return base, 0, 0
    root, offset, _ = column_slice(base)
    return root, offset + begin, offset + begin + width


def replace(graph: Graph, old: fx.Node, new: fx.Node) -> None:
    """Let `new` stand where `old` stood."""
    old.replace_all_uses_with(new)
    graph.fx.erase_node(old)


def drop_unused(graph: Graph) -> Graph:
    """Remove nodes, and weights, that nobody uses; then constants that no recipe names."""
    graph.fx.eliminate_dead_code()
    for name, node in graph.placeholders.items():
        if name in graph.weights and not node.users:
            graph.fx.erase_node(node)
            del graph.weights[name]
    named = {n for w in graph.weights.values() for n in _constants(w.recipe)}
    for name in [n for n in graph.constants if n not in named]:
        del graph.constants[name]
    return graph


def _constants(recipe: Recipe) -> list[str]:
    return [recipe.params[0]] if recipe.op == "constant" else [n for i in recipe.inputs for n in _constants(i)]
