"""From what `make_fx` records to the dialect: no noise, dialect ops for what they stand for, logits for the rows that need them."""

from __future__ import annotations

from typing import Any

import torch
from ingot.ops import Graph
from ingot.ops.graph import op_of
from torch import fx

_aten = torch.ops.aten
_ingot = torch.ops.ingot
_NO_EFFECT = frozenset(
    {_aten._assert_tensor_metadata.default, _aten._assert_scalar.default, _aten._assert_async.msg, _aten.sym_constrain_range_for_size.default, torch._C._set_grad_enabled}
)  # fmt: skip
_IDENTITIES = frozenset(
    {_aten.alias.default, _aten.detach.default, _aten.contiguous.default, _aten.clone.default, _aten.lift_fresh_copy.default, _aten.dropout.default}
)
_IDENTITIES_IF_ALIKE = frozenset(
    {
        _aten.to.dtype,
        _aten.to.device,
        _aten.to.dtype_layout,
        _aten._to_copy.default,
        _aten.type_as.default,
        _aten.expand.default,
        _aten.slice.Tensor,
        _aten.to.other,
    }
)


def canonicalize(graph: Graph) -> Graph:
    """`graph` (changed in place) without nodes that compute nothing, and with `ingot.linear` and `ingot.embedding`."""
    for node in list(graph.fx.nodes):
        if node.op != "call_function":
            continue
        if node.target in _NO_EFFECT:
            graph.fx.erase_node(node)
        elif node.target in _IDENTITIES or (node.target in _IDENTITIES_IF_ALIKE and _alike(node.meta["val"], node.args[0].meta["val"])):
            node.replace_all_uses_with(node.args[0])
            graph.fx.erase_node(node)
        elif node.target is _aten.view.default:
            node.target = _aten.reshape.default  # a view of what was made contiguous above need not be one now
        elif node.target is _aten.linear.default:
            node.target, node.args = _ingot.linear.default, (*node.args, None)[:3]
        elif node.target is _aten.embedding.default:
            node.target, node.args, node.kwargs = _ingot.embedding.default, (node.args[1], node.args[0]), {}
    graph.fx.eliminate_dead_code()
    return graph


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.dim() == b.dim() and all(str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True))


def gather_logits_rows(graph: Graph) -> Graph:
    """Insert `gather_rows` where every op from there to the logits works row by row: after the last mix, before the final norm."""
    output = graph.fx.output_node()
    node, chain = output.args[0][0], []
    tokens = str(graph.placeholders["input_ids"].meta["val"].shape[0])
    while (source := _row_source(node, tokens)) is not None:
        chain.append(node)
        node = source
    first = chain[-1] if chain else output
    with graph.fx.inserting_before(first):
        rows = graph.call(_ingot.gather_rows.default, node, graph.placeholders["logits_rows"])
    if chain:
        first.replace_input_with(node, rows)
    else:
        output.args = ([rows, *output.args[0][1:]],)
    for late in reversed(chain):
        late.meta["val"] = graph.fake(late.target, late.args, late.kwargs)
    return graph


def _row_source(node: fx.Node, tokens: str) -> fx.Node | None:
    """The only operand that has rows, if row t of `node` depends on row t of it alone."""
    if node.op != "call_function" or not isinstance(node.meta["val"], torch.Tensor) or len(node.users) != 1:
        return None
    operands = [n for n in node.all_input_nodes if tokens in {str(s) for v in _tensors(n.meta["val"]) for s in v.shape}]
    if len(operands) != 1 or operands[0] is not node.args[0] or not isinstance(operands[0].meta["val"], torch.Tensor):
        return None
    (source,) = operands
    if str(node.meta["val"].shape[0]) != tokens or str(source.meta["val"].shape[0]) != tokens:
        return None
    spec = op_of(node)
    if spec is not None:
        return source if spec.rowwise else None
    rows_kept = node.target is _aten.reshape.default and node.args[1][0] == -1
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    casts = node.target in (_aten.to.dtype, _aten._to_copy.default)
    last_dim_slice = node.target is _aten.slice.Tensor and node.args[1] not in (0, -source.meta["val"].dim())
    return source if rows_kept or pointwise or casts or last_dim_slice else None


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]
