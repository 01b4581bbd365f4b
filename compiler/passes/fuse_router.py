"""What chooses experts becomes `route`: softmax, top-k, normalization, scale and cast of one row are one kernel, or none of them is claimed."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ingot.ops import Graph, InputSpec
from ingot.ops.target import Target

from ..from_function import from_function
from .match import argument, aten, calls, drop_unused, ingot, only_user

MAX_WIDTH, MAX_ACTIVE = 1024, 32
"""Of rows that a kernel holds, and passes over one: a longer list of indices is no router's."""


def fuse_router(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    for node in list(graph.fx.nodes):
        if calls(node, aten.topk.default) and _fits(node):
            _fuse(graph, node)
    return drop_unused(graph)


def _fits(node: fx.Node) -> bool:
    x, k = node.args[0].meta["val"], argument(node, "k")  # type: ignore[union-attr]
    last = argument(node, "dim") in (-1, x.dim() - 1) and isinstance(x.shape[-1], int)
    return last and x.dim() > 1 and x.is_floating_point() and argument(node, "largest") and k <= MAX_ACTIVE and x.shape[-1] <= MAX_WIDTH


def _fuse(graph: Graph, node: fx.Node) -> None:
    logits: Any = node.args[0]
    taken = {n.args[1]: n for n in node.users if calls(n, operator.getitem)}
    softmax = _softmax(logits) and len(logits.users) == 1
    if softmax:
        logits = logits.args[0]
        if calls(logits, aten.to.dtype) and logits.args[0].meta["val"].is_floating_point():
            logits = logits.args[0]
    end, renormalize, scale = taken.get(0), False, 1.0
    if end is not None:
        after = only_user(end)
        if not softmax and after is not None and calls(after, aten.softmax.int) and _over_last(after):
            end, softmax, renormalize = after, True, True
        elif (divided := _normalized(end)) is not None:
            end, renormalize = divided, True
        after = only_user(end)
        if after is not None and calls(after, aten.mul.Tensor, aten.mul.Scalar) and isinstance(after.args[1], (int, float)) and _wide(end):
            end, scale = after, float(after.args[1])
        after = only_user(end)
        if after is not None and calls(after, aten.to.dtype) and after.meta["val"].is_floating_point() and _wide(end):
            end = after
    with graph.fx.inserting_before(node):
        dtype = (node if end is None else end).meta["val"][0 if end is None else ...].dtype
        routed = graph.call(ingot.route.default, logits, argument(node, "k"), softmax, renormalize, scale, dtype)
        for old, index in ((end, 0), (taken.get(1), 1)):
            if old is not None:
                old.replace_all_uses_with(graph.getitem(routed, index))


def _wide(node: fx.Node) -> bool:
    """In float32, as `route` computes: another dtype rounds in between."""
    return node.meta["val"].dtype == torch.float32  # type: ignore[no-any-return]


def _over_last(node: fx.Node) -> bool:
    return argument(node, "dim") in (-1, node.meta["val"].dim() - 1)


def _softmax(node: fx.Node) -> bool:
    return calls(node, aten.softmax.int) and _over_last(node) and _wide(node)


def _normalized(node: fx.Node) -> fx.Node | None:
    """node / node.sum(-1, keepdim=True), if that is all that becomes of `node`."""
    divided = next((u for u in node.users if calls(u, aten.div.Tensor) and u.args[0] is node), None)
    total = divided.args[1] if divided is not None else None
    if not calls(total, aten.sum.dim_IntList) or set(node.users) != {divided, total} or len(total.users) > 1 or not _wide(node):  # type: ignore[union-attr]
        return None
    dims = [d % node.meta["val"].dim() for d in argument(total, "dim")]  # type: ignore[arg-type]
    return divided if argument(total, "keepdim") and dims == [node.meta["val"].dim() - 1] else None  # type: ignore[arg-type]


def example() -> Graph:
    def fn(x: torch.Tensor, groups: torch.Tensor) -> list[torch.Tensor]:
        values, ids = torch.topk(torch.softmax(x, -1, dtype=torch.float32), 3, -1)
        weights = (values / values.sum(-1, keepdim=True) * 2.5).to(torch.bfloat16)
        best, places = torch.topk(groups, 2, -1, sorted=False)
        late, _ = torch.topk(x, 2, -1)
        return [weights, ids, best.sum(-1), places, torch.softmax(late, -1)]

    return from_function(fn, {"x": InputSpec(torch.float32, ("T", 8)), "groups": InputSpec(torch.float32, ("T", 2, 5))})
