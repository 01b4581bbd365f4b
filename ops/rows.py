"""What a node computes row by row: where nobody reads the other rows, it may be given fewer."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .graph import Region, op_of

_aten = torch.ops.aten
CASTS = frozenset({_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten.to.other, _aten._to_copy.default, _aten.type_as.default})


def row_operands(node: fx.Node, tokens: str) -> list[fx.Node] | None:
    """The operands that have rows, if row t of every result depends on row t of these alone. `tokens`: the size of a first dim of rows, as it is printed.

    Of a `getitem` that is the call of which it is one result.
    """
    if node.op != "call_function":
        return None
    operands = [n for n in node.all_input_nodes if tokens in {str(s) for v in _tensors(n.meta["val"]) for s in v.shape}]
    if not operands or not all(_has_rows(n, tokens) for n in [node, *operands]):
        return None
    if node.target is operator.getitem:
        return operands
    if not all(isinstance(n.meta["val"], torch.Tensor) for n in operands):
        return None
    return operands if _by_row(node, operands, tokens) else None


def _has_rows(node: fx.Node, tokens: str) -> bool:
    """Whether the first dim of every tensor that a node stands for is of rows, and no other one."""
    return all([str(s) == tokens for s in v.shape] == [True] + [False] * (v.dim() - 1) for v in _tensors(node.meta["val"]))


def _by_row(node: fx.Node, operands: list[fx.Node], tokens: str) -> bool:
    if (spec := op_of(node)) is not None:
        return spec.rowwise  # type: ignore[no-any-return]
    if isinstance(node.target, Region):
        return all(row_operands(inner, tokens) is not None for inner in node.target.module.graph.nodes if inner.op == "call_function")
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return all(n.meta["val"].dim() == node.meta["val"].dim() for n in operands)
    keeps_rows = node.target is _aten.reshape.default and node.args[1][0] == -1  # type: ignore[index]
    slices_columns = node.target is _aten.slice.Tensor and node.args[1] not in (0, -operands[0].meta["val"].dim())
    return bool(keeps_rows or slices_columns or node.target in CASTS)


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]
