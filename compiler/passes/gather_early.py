"""Rows that nobody wants logits of end where the last attention does: what works row by row behind it computes the others alone.

Of a prompt's tokens that is mostly the last one. So the last layer's products, of a model of 32 layers the 32nd part of all, cost next to nothing there. Where
every sequence has one token no row would be left out, and there is one copy of rows instead of several.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ingot.ops import Graph, InputSpec
from ingot.ops.graph import Region, op_of
from ingot.ops.rows import row_operands
from ingot.ops.target import Target

from ..from_function import from_function
from .group_regions import group_regions
from .match import calls, drop_unused, ingot, replace


def gather_early(graph: Graph, target: Target) -> Graph:
    """The graph itself where rows are gathered early already. A region that is crossed is taken apart and grouped again."""
    graph = (original := graph).copy()
    gathers = [n for n in graph.fx.nodes if calls(n, ingot.gather_rows.default)]
    few = _few(graph, gathers)
    if not any(op_of(node) is not None for node in few):
        return original
    early = _Early(graph, gathers[0].args[1])
    for node, operands in few.items():
        with graph.fx.inserting_before(node):
            early.add(node, operands)
    for gather in gathers:
        replace(graph, gather, early.copies[gather.args[0]])
    graph = drop_unused(graph)
    return group_regions(graph, target) if any(isinstance(n.target, Region) for n in few) else graph


def _few(graph: Graph, gathers: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Nodes whose rows nobody reads but `gathers`, which gather the same ones, and other such nodes; with their operands that have rows."""
    sizes = {str(g.args[0].meta["val"].shape[0]) for g in gathers}  # type: ignore[union-attr]
    if len(sizes) != 1 or len({g.args[1] for g in gathers}) != 1:
        return {}
    (tokens,) = sizes
    few: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.fx.nodes):
        if node.users and all(u in few or u in gathers for u in node.users) and (operands := row_operands(node, tokens)) is not None:
            few[node] = operands
    return {n: operands for n, operands in reversed(few.items()) if n.target is not operator.getitem or n.args[0] in few}


class _Early:
    """Copies of nodes that compute the rows `rows` alone, at the graph's insertion point."""

    def __init__(self, graph: Graph, rows: fx.Node) -> None:
        self.graph, self.rows = graph, rows
        self.copies: dict[fx.Node, Any] = {}  # of a region of several results, all of them

    def add(self, node: fx.Node, operands: list[fx.Node]) -> None:
        for operand in operands:
            if operand not in self.copies:
                self.copies[operand] = self.graph.call(ingot.gather_rows.default, operand, self.rows)
        if isinstance(node.target, Region):
            self.copies[node] = self._opened(node)
        else:
            self.copies[node] = self._copy(node, self.copies)

    def _copy(self, node: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
        if node.target is operator.getitem:
            results, index = copies[node.args[0]], node.args[1]  # type: ignore[index]
            return self.graph.getitem(results, index) if isinstance(results, fx.Node) else results[index]  # type: ignore[arg-type, no-any-return]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
        copy = self.graph.fx.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        copy.meta = node.meta | {"val": self.graph.fake(node.target, args, kwargs)}
        return copy

    def _opened(self, node: fx.Node) -> Any:
        """What a region computes, op by op."""
        inner = node.target.module.graph  # type: ignore[union-attr]
        given = (self.copies.get(n, n) for n in node.args)  # type: ignore[call-overload]
        copies = dict(zip([n for n in inner.nodes if n.op == "placeholder"], given, strict=True))
        for one in inner.nodes:
            if one.op == "call_function":
                copies[one] = self._copy(one, copies)
        return fx.map_arg(inner.output_node().args[0], lambda n: copies[n])


def example() -> Graph:
    def fn(x: torch.Tensor, rows: torch.Tensor, o: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, norm_weight: torch.Tensor) -> list[torch.Tensor]:
        mixed = torch.cumsum(x, 0)  # a row depends on those before it
        h = ingot.linear_add(mixed.reshape([-1, 8]), o, None, x)
        normalized, total = ingot.add_rms_norm(ingot.linear_glu(h, gate_up, "silu"), h, norm_weight, 1e-6)
        return [ingot.linear(ingot.gather_rows(ingot.linear(normalized, down, None) + torch.tanh(total), rows), down, None), mixed]

    f32 = torch.float32
    weights = {"o": (f32, (8, 8)), "gate_up": (f32, (16, 8)), "down": (f32, (8, 8)), "norm_weight": (f32, (8,))}
    return from_function(fn, {"x": InputSpec(f32, ("T", 8)), "rows": InputSpec(torch.int32, ("R",))}, weights=weights)
