"""A norm whose only reader is a product becomes part of it: on a GPU a launch less, and a tensor that is never written.

So does a norm with the sum that it is of, before a product that rounds its rows.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

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
        if calls(norm, ingot.add_rms_norm.default):
            _fuse_sum(graph, norm)
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


def _fuse_sum(graph: Graph, pair: fx.Node) -> None:
    results = {n.args[1]: n for n in pair.users if calls(n, operator.getitem)}
    product = only_user(results[0]) if 0 in results else None
    if not calls(product, ingot.quantized_linear.default) or product.args[0] is not results[0] or results[0].meta["val"].dim() != 2:  # type: ignore[union-attr]
        return
    assert product is not None
    if argument(product, "activation") == "none" or any(argument(product, n) is not None for n in ("zero", "residual", "eps")):
        return
    x, added, norm_weight, eps, offset = (argument(pair, n) for n in ("x", "residual", "weight", "eps", "offset"))
    given = (argument(product, n) for n in ("weight", "scale", "input_scale", "bias", "act", "format", "layout", "activation", "n"))
    with graph.fx.inserting_before(pair):
        both = graph.call(ingot.add_rms_norm_quantized_linear.default, x, added, norm_weight, *given, eps, offset)
        out, total = graph.getitem(both, 0), graph.getitem(both, 1)
    replace(graph, product, out)
    if 1 in results:
        results[1].replace_all_uses_with(total)


def example() -> Graph:
    def fn(x: torch.Tensor, norm_weight: torch.Tensor, w: torch.Tensor, b: torch.Tensor, gate_up: torch.Tensor, codes: torch.Tensor,
           scale: torch.Tensor) -> list[torch.Tensor]:  # fmt: skip
        nothing = (None,) * 5
        h = ingot.linear(ingot.rms_norm(x, norm_weight, 1e-6), w, b)
        h = ingot.linear_glu(ingot.rms_norm(h, None, 1e-5, 1.0), gate_up, "silu")
        normalized = ingot.rms_norm(h, None, 1e-5)
        normalized, total = ingot.add_rms_norm(ingot.quantized_linear(normalized, codes, scale, *nothing, "int8_channel", "rows", "none", 10), h, None, 1e-5)
        return [total, ingot.quantized_linear(normalized, codes, scale, *nothing, "int8_channel", "rows", "int8_token", 10)]

    f32 = torch.float32
    shapes = {"norm_weight": (24,), "w": (16, 24), "b": (16,), "gate_up": (20, 16), "scale": (10, 1)}
    weights = {n: (f32, s) for n, s in shapes.items()} | {"codes": (torch.int8, (10, 10))}
    return from_function(fn, {"x": InputSpec(f32, ("T", 24))}, weights=weights)
