"""Experts whose weights dequantize parts become `quantized_moe` over these, where kernels of the target read their format."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from ingot.ops import Graph, InputSpec, Recipe, Weight, formats
from ingot.ops.target import Target

from ..from_function import from_function
from ..quantization import Quantized, expert_formats, quantized_experts, read_experts
from .match import argument, calls, drop_unused, ingot
from .match import replace as replace_node


def quantize_experts(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    for node in list(graph.fx.nodes):
        if not calls(node, ingot.moe.default) or argument(node, "transposed") or argument(node, "interleaved"):
            continue
        x, ids, chosen, w_in, b_in, w_out, b_out, act, gated, *_ = node.args
        first, second = (read_experts(graph.weights[w.name].recipe) if w.name in graph.weights else None for w in (w_in, w_out))
        pieces = 2 if gated else 1
        if first is None or second is None or first.format != second.format or not (_fits(first, w_in, pieces, target) and _fits(second, w_out, 1, target)):
            continue
        form = formats.get(first.format)
        layout = form.layout(target, experts=True)
        into, out = _parts(graph, w_in, first, layout, pieces), _parts(graph, w_out, second, layout, 1)
        with graph.fx.inserting_before(node):
            how = (first.format, layout, form.activation(target), second.k)
            replace_node(graph, node, graph.call(ingot.quantized_moe.default, x, ids, chosen, *into, b_in, *out, b_out, act, gated, *how))
    return drop_unused(graph)


def _fits(found: Quantized, weight: fx.Node, pieces: int, target: Target) -> bool:
    """Whether a kernel reads the format, and no two experts, nor gate and up, share a scale."""
    _, n, _ = weight.meta["val"].shape
    return found.format in expert_formats(target) and n % (pieces * formats.get(found.format).rows) == 0


def _parts(graph: Graph, node: fx.Node, found: Quantized, layout: str, pieces: int) -> list[fx.Node | None]:
    """Codes, scales and zeros, packed one expert after the other, and of each expert one piece after the other."""
    experts = node.meta["val"].shape[0]
    form = formats.get(found.format)
    plain = form.quantize(torch.empty(found.n // experts, found.k, dtype=getattr(torch, found.dtype), device="meta"))
    parts: dict[str, fx.Node | None] = {"weight": None, "scale": None, "zero": None}
    for part, like in formats.packed(plain, found.format, layout, pieces).items():
        shape = (experts, *like.shape)
        recipe = Recipe("reshape", shape, (Recipe("pack", (found.format, layout, part, found.n, found.k, experts * pieces), found.parts),))
        parts[part] = graph.add_weight(f"{node.name}_{layout}_{part}", Weight(recipe, like.dtype, shape))
    return list(parts.values())


def example() -> Graph:
    def fn(x: torch.Tensor, scores: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, b_out: torch.Tensor) -> list[torch.Tensor]:
        weights, ids = ingot.route(scores, 2, True, True, 1.0, torch.float32)
        return [ingot.moe(x, ids, weights, w_in, None, w_out, b_out, "silu", True, False, False)]

    f32 = torch.float32
    inputs = {"x": InputSpec(f32, ("T", 12)), "scores": InputSpec(f32, ("T", 3))}
    graph = from_function(fn, inputs, weights={"w_in": (f32, (3, 16, 12)), "w_out": (f32, (3, 12, 8)), "b_out": (f32, (3, 12))})
    for name in ("w_in", "w_out"):
        graph.weights[name] = replace(graph.weights[name], recipe=quantized_experts(graph.weights[name], "int8_channel"))
    return graph
