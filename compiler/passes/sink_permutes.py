"""Carry permutes down through ops that do not care about the order of dims, so that they meet and cancel.

Modeling code puts heads first and then splits, normalizes, concatenates; the dialect's ops want tokens first. For each
value that is `permute(source, order)`, an op over such values of one order is computed on the sources, and its result is
permuted instead. What nobody reads in the permuted form is never permuted.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ingot.ops import Graph

from .match import argument, ingot

_aten = torch.ops.aten
PERMUTES = (_aten.permute.default, _aten.transpose.int, _aten.t.default)
_ALONG_DIM = frozenset(
    {_aten.slice.Tensor, _aten.split.Tensor, _aten.split.sizes, _aten.split_with_sizes.default, _aten.chunk.default, _aten.cat.default, _aten.softmax.int}
)
_CASTS = frozenset({_aten.to.dtype, _aten._to_copy.default})

_Twin = tuple[fx.Node, list[int]]
"""(source, order): the value is source with its dims in this order."""


def order_of(node: Any) -> list[int]:
    """Which dim of its operand each dim of a permute's result is."""
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if node.target is _aten.permute.default:
        return [int(d) % rank for d in argument(node, "dims")]
    a, b = (0, rank - 1) if node.target is _aten.t.default else (int(d) % rank for d in node.args[1:3])
    order[a], order[b] = order[b], order[a]
    return order


def sink_permutes(graph: Graph) -> Graph:
    """`graph`, changed in place."""
    twins: dict[fx.Node, _Twin] = {}
    for node in list(graph.fx.nodes):
        if node.op != "call_function":
            continue
        with graph.fx.inserting_before(node):
            twin = _twin(graph, node, twins)
        if twin is not None:
            twins[node] = twin
    for node, (source, order) in reversed(twins.items()):
        if not node.users:
            graph.fx.erase_node(node)
        elif node.target not in PERMUTES:
            with graph.fx.inserting_before(node):
                whole = source if order == list(range(len(order))) else graph.call(_aten.permute.default, source, order)
            node.replace_all_uses_with(whole)
            graph.fx.erase_node(node)
    graph.fx.eliminate_dead_code()
    return graph


def _twin(graph: Graph, node: Any, twins: dict[fx.Node, _Twin]) -> _Twin | None:
    if node.target in PERMUTES:
        dims, source = order_of(node), node.args[0]
        if source in twins:
            source, inner = twins[source]
            dims = [inner[d] for d in dims]
        return source, dims
    permuted = [n for n in node.all_input_nodes if n in twins]
    if not permuted:
        return None
    order = twins[permuted[0]][1]
    if node.target is operator.getitem:
        return graph.getitem(twins[permuted[0]][0], node.args[1]), order
    args = _arguments(node, order, twins)
    if args is None:
        return None
    new = graph.fx.call_function(node.target, tuple(args), dict(node.kwargs))
    new.meta = {k: v for k, v in node.meta.items() if k != "val"}
    new.meta["val"] = graph.fake(node.target, tuple(args), dict(node.kwargs))
    return new, order


def _arguments(node: Any, order: list[int], twins: dict[fx.Node, _Twin]) -> list[Any] | None:
    """The node's arguments over sources; None if the op minds, or an operand lies in another order."""
    target, rank = node.target, len(order)
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    if target is ingot.rms_norm.default:
        if order[-1] != rank - 1 or node.args[0] not in twins:
            return None
        return [twins[node.args[0]][0], *node.args[1:]]
    if not (pointwise or target in _ALONG_DIM or target in _CASTS or target is _aten.expand.default):
        return None

    fits = True

    def source(operand: fx.Node) -> fx.Node:
        nonlocal fits
        if operand in twins and twins[operand][1] == order:
            return twins[operand][0]
        behind = operand.meta["val"].dim() if isinstance(operand.meta["val"], torch.Tensor) else rank
        fits = fits and pointwise and operand not in twins and behind < rank and order[rank - behind :] == list(range(rank - behind, rank))
        return operand

    args: list[Any] = []
    for declared, given in zip(target._schema.arguments, node.args, strict=False):
        if declared.name == "dim" and isinstance(given, int):
            args.append(order[given % rank])
        elif declared.name == "size" and target is _aten.expand.default:
            sizes = [0] * rank
            if len(given) != rank or node.args[0].meta["val"].dim() != rank:
                return None
            for place, size in zip(order, given, strict=True):
                sizes[place] = size
            args.append(sizes)
        else:
            args.append(fx.map_arg(given, source))
    has_dim = "dim" in [a.name for a in target._schema.arguments[: len(node.args)]]
    return args if fits and (has_dim or target not in _ALONG_DIM) and "dim" not in node.kwargs else None
