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
        if calls(product, *FUSED) and product.args[0] is norm and norm.args[0].meta["val"].dtype == product.args[1].meta["val"].dtype:
            x, norm_weight, eps, offset = (argument(norm, n) for n in ("x", "weight", "eps", "offset"))
            with graph.fx.inserting_before(product):
                replace(graph, product, graph.call(FUSED[product.target], x, norm_weight, *product.args[1:], eps, offset))
    return drop_unused(graph)


def example() -> Graph:
    def fn(x: torch.Tensor, norm_weight: torch.Tensor, w: torch.Tensor, b: torch.Tensor, gate_up: torch.Tensor) -> list[torch.Tensor]:
        h = ingot.linear(ingot.rms_norm(x, norm_weight, 1e-6), w, b)
        return [ingot.linear_glu(ingot.rms_norm(h, None, 1e-5, 1.0), gate_up, "silu")]

    f32 = torch.float32
    shapes = {"norm_weight": (24,), "w": (16, 24), "b": (16,), "gate_up": (20, 16)}
    return from_function(fn, {"x": InputSpec(f32, ("T", 24))}, weights={n: (f32, s) for n, s in shapes.items()})
