"""Take the leading batch dim of 1 out of a traced graph: transformers computes on [1, T, …], the dialect on [T, …].

Each value [1, …] gets a *flat* twin without that dim, made by the same op on flat operands with its dims shifted. An op that
is not known to commute with it reads its operand through an `unsqueeze`; nothing here depends on what the model is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ingot.ops import Graph
from ingot.ops.graph import op_of
from ingot.ops.rows import CASTS

from .canonical import sizes

_aten = torch.ops.aten
_RESHAPES = frozenset({_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default, _aten.flatten.using_ints, _aten.unflatten.int})
_ALONG_DIM = frozenset(
    {
        *(_aten.softmax.int, _aten.log_softmax.int, _aten._softmax.default, _aten.cumsum.default, _aten.roll.default),
        *(_aten.sum.dim_IntList, _aten.mean.dim, _aten.amax.default, _aten.max.dim, _aten.argmax.default, _aten.topk.default, _aten.sort.default),
        *(_aten.slice.Tensor, _aten.select.int, _aten.split.Tensor, _aten.split.sizes, _aten.split_with_sizes.default, _aten.chunk.default, _aten.unbind.int),
        *(_aten.cat.default, _aten.stack.default, _aten.gather.default, _aten.scatter.src, _aten.scatter.value),
        *(_aten.transpose.int, _aten.unsqueeze.default, _aten.squeeze.dim),
    }
)
_ROWWISE = frozenset({_aten.layer_norm.default})  # its other operands have no rows
_DIMS = ("dim", "dims", "dim0", "dim1")
_ROW_OPERANDS = frozenset({"x", "residual", "gate", "gate_up", "ids"})  # of the dialect's ops over [..., D]


def unbatch(graph: Graph) -> Graph:
    """`graph` (changed in place) without values of the form [1, …] wherever an op commutes with dropping that dim."""
    _drop_leading_ones(graph)
    if any(n.op == "call_function" and _leading_one(n.meta["val"]) and _rank(n.meta["val"]) > 2 for n in graph.fx.nodes):
        _drop_leading_ones(graph)  # a single head or group behind the batch dim
    return graph


def _drop_leading_ones(graph: Graph) -> None:
    flat: dict[fx.Node, fx.Node] = {}
    for node in list(graph.fx.nodes):
        if node.op != "call_function":
            continue
        with graph.fx.inserting_before(node):
            new = _flat(graph, node, flat)
        if new is not None:
            flat[node] = new
    for node, twin in reversed(flat.items()):  # users first: most are twins of each other and leave nobody to restore for
        if not node.users:
            graph.fx.erase_node(node)
        elif isinstance(node.meta["val"], torch.Tensor):
            _restore(graph, node, twin)
    graph.fx.eliminate_dead_code()


def _restore(graph: Graph, node: fx.Node, twin: fx.Node) -> None:
    with graph.fx.inserting_after(twin):
        whole = graph.call(_aten.unsqueeze.default, twin, 0)
    node.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)


def _leading_one(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_leading_one(v) for v in value)
    return isinstance(value, torch.Tensor) and value.dim() > 0 and isinstance(value.shape[0], int) and value.shape[0] == 1


def _flat(graph: Graph, node: Any, flat: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The flat twin of `node`; for a node that is flat already and reads a flat twin, it is rewired in place."""
    value = node.meta["val"]
    if node.target in _RESHAPES:
        source = flat.get(node.args[0], node.args[0])
        if _leading_one(value) and value.dim() > 1:
            return graph.call(_aten.reshape.default, source, sizes(value.shape[1:], node.args[1]))
        if source is not node.args[0]:
            replacement = graph.call(_aten.reshape.default, source, sizes(value.shape, node.args[1]))
            node.replace_all_uses_with(replacement)
        return None
    first: Any = node.args[0] if node.args else None
    if node.target is _aten.unsqueeze.default and node.args[1] in (0, -value.dim()):
        return first
    drops = (node.target is _aten.squeeze.dim and node.args[1] in (0, -first.meta["val"].dim())) or (
        node.target is _aten.select.int and node.args[1:] == (0, 0)
    )
    if drops and first in flat:
        node.replace_all_uses_with(flat[first])
        return None
    if not _leading_one(value) or not any(n in flat for n in node.all_input_nodes):
        return None
    if getattr(node.target, "__name__", "") == "getitem":
        return graph.getitem(flat[first], node.args[1])
    return _call_flat(graph, node, flat)


def _call_flat(graph: Graph, node: Any, flat: dict[fx.Node, fx.Node]) -> fx.Node | None:
    target, spec = node.target, op_of(node)
    rank = _rank(node.meta["val"])
    if not isinstance(target, torch._ops.OpOverload):
        return None
    pointwise, along = torch.Tag.pointwise in target.tags or target in CASTS, target in _ALONG_DIM
    expand, permute = target is _aten.expand.default, target is _aten.permute.default
    batched_matmul, rowwise = target in (_aten.matmul.default,), target in _ROWWISE and rank > len(node.args[1]) + 1
    if not (pointwise or along or expand or permute or batched_matmul or rowwise or spec is not None):
        return None
    if spec is not None and spec.arguments[0] not in _ROW_OPERANDS:
        return None
    args: list[Any] = []
    schema = target._schema.arguments
    for declared, given in zip(schema, node.args, strict=False):
        if (spec is not None and declared.name not in _ROW_OPERANDS) or (rowwise and args):
            args.append(given)
        elif declared.name in _DIMS and (along or permute):
            operand = _rank(_first_tensor(node).meta["val"]) + (target in (_aten.unsqueeze.default, _aten.stack.default))
            shifted = _shift(given, operand, permute)
            if shifted is None:
                return None
            args.append(shifted)
        elif expand and declared.name == "size":
            args.append([-1 if not isinstance(s, int) else s for s in list(given)[1:]])
        else:
            operands = fx.map_arg(given, lambda n: _operand(graph, n, flat, rank if pointwise else None))
            if any(o is None for o in (operands if isinstance(operands, (list, tuple)) else [operands]) if given is not None) and _has_node(given):
                return None
            args.append(operands)
    new = graph.fx.call_function(target, tuple(args), dict(node.kwargs))
    new.meta.update({k: v for k, v in node.meta.items() if k != "val"})
    new.meta["val"] = graph.fake(target, tuple(args), dict(node.kwargs))
    if _same_without_batch(node.meta["val"], new.meta["val"]):
        return new
    graph.fx.erase_node(new)
    return None


def _operand(graph: Graph, node: fx.Node, flat: dict[fx.Node, fx.Node], rank: int | None) -> fx.Node | None:
    """The twin of an operand. For a pointwise op of rank `rank`, an operand of smaller rank broadcasts as it is."""
    if node in flat:
        return flat[node]
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return node
    if rank is not None and value.dim() < rank:
        return node
    return graph.call(_aten.squeeze.dim, node, 0) if _leading_one(value) else None


def _shift(dims: Any, rank: int, permute: bool) -> Any:
    """Dims of the flat operand; None when the batch dim itself is meant."""
    if isinstance(dims, (list, tuple)):
        positive = [d % rank for d in dims]
        if permute:
            return [d - 1 for d in positive[1:]] if positive[0] == 0 else None
        return [d - 1 for d in positive] if 0 not in positive else None
    positive = dims % rank
    return positive - 1 if positive else None


def _first_tensor(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _rank(value: Any) -> int:
    return value[0].dim() if isinstance(value, (tuple, list)) else value.dim()


def _has_node(arg: Any) -> bool:
    return isinstance(arg, fx.Node) or (isinstance(arg, (list, tuple)) and any(isinstance(a, fx.Node) for a in arg))


def _same_without_batch(old: Any, new: Any) -> bool:
    if isinstance(old, (tuple, list)):
        return len(old) == len(new) and all(_same_without_batch(o, n) for o, n in zip(old, new, strict=True))
    return [str(s) for s in old.shape[1:]] == [str(s) for s in new.shape]
