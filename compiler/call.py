"""Nodes of a graph as kernel families see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ingot.ops import Graph
from ingot.ops.graph import Region, op_of
from ingot.ops.kernel import Call, Tensor


def call_of(graph: Graph, node: fx.Node) -> Call | None:
    """A call of a dialect op or a region as kernel families see it; None for anything else."""
    if isinstance(node.target, Region):
        return region_call(graph, node.target, node.args, node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]])  # type: ignore[arg-type]
    spec = op_of(node)
    if spec is None:
        return None
    args: dict[str, Any] = {}
    for i, argument in enumerate(spec.overload._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        args[argument.name] = tensor_type(graph, value) if isinstance(value, fx.Node) else value
    results = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
    results = results[: len(results) - len(spec.states)]
    return Call(spec.name, args, tuple(_type(graph, r) for r in results))


def region_call(graph: Graph, region: Region, inputs: Sequence[fx.Node], results: Sequence[torch.Tensor]) -> Call:
    """A call of a region with nodes as inputs and results like these."""
    args = {n: tensor_type(graph, i) for n, i in zip(region.arguments, inputs, strict=True)}
    return Call(region.name, args, tuple(_type(graph, r) for r in results), region)


def tensor_type(graph: Graph, node: fx.Node) -> Any:
    value = node.meta["val"]
    return _type(graph, value) if isinstance(value, torch.Tensor) else graph.dim(value)


def _type(graph: Graph, value: torch.Tensor) -> Tensor:
    return Tensor(value.dtype, tuple(graph.dim(s) for s in value.shape))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
