"""A norm whose only reader is a product becomes part of it: on a GPU a launch less, and a tensor that is never written."""

from __future__ import annotations

import torch

from ingot.ops import Graph, InputSpec
from ingot.ops.target import Target

from ..from_function import from_function
from .match import argument, calls, drop_unused, ingot, only_user, replace

FUSED = {ingot.linear.default: ingot.rms_norm_linear.default, ingot.linear_glu.default: ingot.rms_norm_linear_glu.default}


def fuse_norm_linear(graph: Graph, target: Target) -> Graph:
    """For CUDA targets alone: between CPU kernels there is no launch to save."""
    if target.kind != "cuda":
        return graph
    graph = graph.copy()
    for norm in list(graph.fx.nodes):
        if not calls(norm, ingot.rms_norm.default) or norm.args[0].meta["val"].dim() != 2:
            continue
        product = only_user(norm)
        x, norm_weight, eps, offset = (argument(norm, n) for n in ("x", "weight", "eps", "offset"))
        if calls(product, *FUSED) and product.args[0] is norm and x.meta["val"].dtype == product.args[1].meta["val"].dtype:
            with graph.fx.inserting_before(product):
                replace(graph, product, graph.call(FUSED[product.target], x, norm_weight, *product.args[1:], eps, offset))
        elif calls(product, ingot.quantized_linear.default) and product.args[0] is norm:
            with graph.fx.inserting_before(product):
                replace(graph, product, graph.call(product.target, x, *product.args[1:], norm_weight, eps, offset))
    return drop_unused(graph)


def example() -> Graph:
    def fn(x: torch.Tensor, norm_weight: torch.Tensor, w: torch.Tensor, b: torch.Tensor, gate_up: torch.Tensor, codes: torch.Tensor,
           scale: torch.Tensor) -> list[torch.Tensor]:  # fmt: skip
        h = ingot.linear(ingot.rms_norm(x, norm_weight, 1e-6), w, b)
        h = ingot.linear_glu(ingot.rms_norm(h, None, 1e-5, 1.0), gate_up, "silu")
        normalized = ingot.rms_norm(h, None, 1e-5)
        return [ingot.quantized_linear(normalized, codes, scale, None, None, None, None, None, "int8_channel", "rows", "none", 6)]

    f32 = torch.float32
    shapes = {"norm_weight": (24,), "w": (16, 24), "b": (16,), "gate_up": (20, 16), "scale": (6, 1)}
    weights = {n: (f32, s) for n, s in shapes.items()} | {"codes": (torch.int8, (6, 10))}
    return from_function(fn, {"x": InputSpec(f32, ("T", 24))}, weights=weights)
