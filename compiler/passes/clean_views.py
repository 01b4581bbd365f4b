"""Compose chains of views, cancel the ones that undo each other (a slice of a cat too), and drop those that change nothing.

Tracing leaves pairs (heads first and back, a dim added and removed) between ops that agree on a layout. Whatever moves no
element is a reshape; whatever only orders dims is a permute; chains of either become one or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ingot.ops import Graph
from ingot.ops.target import Target

from .match import argument, calls, drop_unused, replace, same_shape
from .sink_permutes import PERMUTES, order_of, sink_permutes

_aten = torch.ops.aten
_RESHAPES = (_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default, _aten.flatten.using_ints, _aten.unflatten.int,
             _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.squeeze.default)  # fmt: skip
_DROP_IF_ALIKE = (_aten.slice.Tensor, _aten.expand.default, _aten.reshape.default, _aten.alias.default)


def clean_views(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    _fold_reshapes(graph)  # first: a pair of them would hide that two permutes meet
    sink_permutes(graph)
    for node in list(graph.fx.nodes):
        if calls(node, *PERMUTES):
            _permute(graph, node)
    _fold_reshapes(graph)
    return drop_unused(graph)


def _fold_reshapes(graph: Graph) -> None:
    for node in list(graph.fx.nodes):
        if calls(node, *_RESHAPES):
            _reshape(graph, node)
        elif calls(node, *_DROP_IF_ALIKE) and same_shape(node, node.args[0]):
            replace(graph, node, node.args[0])
        elif calls(node, _aten.slice.Tensor) and calls(node.args[0], _aten.cat.default):
            _slice_of_cat(graph, node)


def _slice_of_cat(graph: Graph, node: Any) -> None:
    """A slice that is one part of a cat is that part."""
    parts, rank = node.args[0].args[0], node.meta["val"].dim()
    dim = argument(node, "dim") % rank
    if argument(node.args[0], "dim") % rank != dim or argument(node, "step") != 1:
        return
    begin, offset = argument(node, "start") or 0, 0
    for part in parts:
        width = part.meta["val"].shape[dim]
        if not isinstance(width, int):
            return
        if offset == begin and same_shape(part, node):
            replace(graph, node, part)
            return
        offset += width


def _reshape(graph: Graph, node: Any) -> None:
    """reshape(reshape(x)) is reshape(x); one that keeps the shape is x."""
    source = node.args[0]
    while calls(source, *_RESHAPES):
        source = source.args[0]
    if same_shape(node, source):
        replace(graph, node, source)
        return
    sizes = [s if isinstance(s, int) else -1 for s in node.meta["val"].shape]
    if sizes.count(-1) > 1 or (node.target is _aten.reshape.default and node.args == (source, sizes)):
        return
    with graph.fx.inserting_before(node):
        new = graph.call(_aten.reshape.default, source, sizes)
    replace(graph, node, new)


def _permute(graph: Graph, node: Any) -> None:
    """permute(permute(x)) is permute(x); one that keeps the order is x."""
    dims, source = order_of(node), node.args[0]
    while calls(source, *PERMUTES):
        inner = order_of(source)
        dims, source = [inner[d] for d in dims], source.args[0]
    if dims == list(range(len(dims))):
        replace(graph, node, source)
    elif _moves_only_ones(node, dims, source):
        with graph.fx.inserting_before(node):
            new = graph.call(_aten.reshape.default, source, [s if isinstance(s, int) else -1 for s in node.meta["val"].shape])
        replace(graph, node, new)
    elif source is not node.args[0]:
        with graph.fx.inserting_before(node):
            new = graph.call(_aten.permute.default, source, dims)
        replace(graph, node, new)


def _moves_only_ones(node: fx.Node, dims: list[int], source: fx.Node) -> bool:
    """Whether the dims larger than 1 keep their order, so that no element moves."""
    shape = source.meta["val"].shape
    moved = [d for d in dims if not (isinstance(shape[d], int) and shape[d] == 1)]
    return moved == sorted(moved) and sum(not isinstance(s, int) for s in node.meta["val"].shape) <= 1


def example() -> Graph:
    from ingot.ops import InputSpec

    from ..from_function import from_function

    def fn(x: torch.Tensor, y: torch.Tensor) -> list[Any]:
        heads = x.reshape(-1, 4, 8).transpose(0, 1)
        back = heads.unsqueeze(0).squeeze(0).permute(1, 0, 2)
        return [torch.nn.functional.silu(back).reshape(-1, 32)[:, 0:32].reshape(-1, 2, 16).reshape(-1, 32) + y]

    f32 = torch.float32
    return from_function(fn, {"x": InputSpec(f32, ("T", 32)), "y": InputSpec(f32, ("T", 32))})
