"""A linear whose weight dequantizes parts becomes `quantized_linear` over the parts, packed as the target's kernels read them.

Columns that a checkpoint stores in another order (GPTQ's act order) stay so: the rows of x are brought into that order instead.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from ingot.ops import Graph, InputSpec, Recipe, Weight, formats
from ingot.ops.target import Target

from ..from_function import from_function
from ..quantization import Quantized, quantized_recipe, read
from .match import aten, calls, drop_unused, ingot
from .match import replace as replace_node


def quantize_linears(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    for node in list(graph.fx.nodes):
        if not calls(node, ingot.linear.default, ingot.linear_add.default, ingot.linear_glu.default) or node.args[1].name not in graph.weights:
            continue
        weight = graph.weights[node.args[1].name]
        found = read(weight.recipe)
        act = node.args[2] if calls(node, ingot.linear_glu.default) else None
        pieces = 1 if act is None else 2
        if found is not None and found.n % (pieces * formats.get(found.format).rows if pieces > 1 else 1) == 0:
            with graph.fx.inserting_before(node):
                replace_node(graph, node, _quantized(graph, node, found, act, pieces, target))
    return drop_unused(graph)


def _quantized(graph: Graph, node: fx.Node, found: Quantized, act: str | None, pieces: int, target: Target) -> fx.Node:
    form = formats.get(found.format)
    layout = form.layout(target)
    name = node.args[1].name
    plain = form.quantize(torch.empty(found.n, found.k, dtype=getattr(torch, found.dtype), device="meta"))
    parts: dict[str, fx.Node | None] = {"weight": None, "scale": None, "zero": None}
    for part, like in formats.packed(plain, found.format, layout, pieces).items():
        recipe = Recipe("pack", (found.format, layout, part, found.n, found.k, pieces), found.parts)
        parts[part] = _weight(graph, f"{name}_{layout}{'_halves' if pieces > 1 else ''}_{part}", Weight(recipe, like.dtype, tuple(like.shape)))
    x, input_scale = node.args[0], None
    if found.order is not None:
        x = graph.call(aten.index_select.default, x, -1, _weight(graph, f"{name}_order", Weight(found.order, torch.int64, (found.k,))))
    if found.input_scale is not None:
        input_scale = _weight(graph, f"{name}_input_scale", Weight(found.input_scale, torch.float32, (1,)))
    bias, residual = (None, None) if act is not None else (node.args[2], node.args[3] if len(node.args) > 3 else None)
    return graph.call(ingot.quantized_linear.default, x, *parts.values(), input_scale, bias, residual, act, found.format, layout, found.activation, found.n)


def _weight(graph: Graph, name: str, weight: Weight) -> fx.Node:
    """The placeholder of this name, new unless another linear has asked for it."""
    return graph.placeholders[name] if graph.weights.get(name) == weight else graph.add_weight(name, weight)


def example() -> Graph:
    def fn(x: torch.Tensor, residual: torch.Tensor, q: torch.Tensor, b: torch.Tensor, gate_up: torch.Tensor) -> list[torch.Tensor]:
        return [ingot.linear(x, q, b), ingot.linear_add(x, q, None, residual), ingot.linear_glu(x, gate_up, "silu")]

    f32 = torch.float32
    inputs = {"x": InputSpec(f32, ("T", 40)), "residual": InputSpec(f32, ("T", 18))}
    graph = from_function(fn, inputs, weights={"q": (f32, (18, 40)), "b": (f32, (18,)), "gate_up": (f32, (10, 40))})
    for name, form in (("q", "int8_channel"), ("gate_up", "int4_group32_zero")):
        graph.weights[name] = replace(graph.weights[name], recipe=quantized_recipe(graph.weights[name], form, "none"))
    return graph
