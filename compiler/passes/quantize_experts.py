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
    """For CUDA targets alone: a CPU's kernels have experts in floats, which is what they are packed as then."""
    if target.kind != "cuda":
        return graph
    graph = graph.copy()
    for node in list(graph.fx.nodes):
        if not calls(node, ingot.moe.default) or argument(node, "transposed") or argument(node, "interleaved"):
            continue
        weights = [argument(node, n) for n in ("w_in", "w_out")]
        found = [read_experts(graph.weights[w.name].recipe) if w.name in graph.weights else None for w in weights]
        if not all(q is not None and q.format == found[0].format and _fits(q, w, target) for q, w in zip(found, weights, strict=True)):  # type: ignore[union-attr]
            continue
        (w_in, s_in), (w_out, s_out) = (_parts(graph, w, q) for w, q in zip(weights, found, strict=True) if q is not None)
        x, ids, chosen, _, b_in, _, b_out, act, gated, *_ = node.args
        with graph.fx.inserting_before(node):
            call = graph.call(ingot.quantized_moe.default, x, ids, chosen, w_in, s_in, b_in, w_out, s_out, b_out, act, gated, found[0].format)  # type: ignore[union-attr]
            replace_node(graph, node, call)
    return drop_unused(graph)


def _fits(found: Quantized, weight: fx.Node, target: Target) -> bool:
    """Whether a kernel reads the format, and no two experts, nor gate and up, share a scale."""
    _, n, _ = weight.meta["val"].shape
    return found.format in expert_formats(target) and n % (2 * formats.get(found.format).rows) == 0


def _parts(graph: Graph, node: fx.Node, found: Quantized) -> list[fx.Node]:
    """Codes [X, N, K] and scales [X, …], packed one expert after the other."""
    experts = node.meta["val"].shape[0]
    form = formats.get(found.format)
    plain = form.quantize(torch.empty(found.n, found.k, dtype=getattr(torch, found.dtype), device="meta"))
    made = []
    for part, like in formats.packed(plain, found.format, "rows", 1).items():
        shape = (experts, like.shape[0] // experts, *like.shape[1:])
        recipe = Recipe("reshape", shape, (Recipe("pack", (found.format, "rows", part, found.n, found.k, 1), found.parts),))
        made.append(graph.add_weight(f"{node.name}_rows_{part}", Weight(recipe, like.dtype, shape)))
    return made


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
