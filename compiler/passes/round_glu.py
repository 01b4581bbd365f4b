"""A gated linear unit before rounded rows joins their rounding: a launch reads gate and up, and writes eight bits.

That is where the product before it is the library's, which leaves gate and up as they are; a generated one gates its own result, and writes half as much.
"""

from __future__ import annotations

import torch
from torch import fx

from ingot.ops import Graph, InputSpec
from ingot.ops.library import multiplies_codes
from ingot.ops.target import Target

from ..from_function import from_function
from .match import argument, calls, drop_unused, ingot, only_user, replace

_KEPT = ("weight", "scale", "input_scale", "bias", "residual", "format", "layout", "activation", "n")


def round_glu(graph: Graph, target: Target) -> Graph:
    """The graph itself where there is none."""
    if target.kind != "cuda" or not any(_unit(node) for node in graph.fx.nodes):
        return graph
    graph = graph.copy()
    for node in list(graph.fx.nodes):
        if (unit := _unit(node)) is None:
            continue
        with graph.fx.inserting_before(unit):
            if calls(unit, ingot.glu.default):
                gate_up, gate = unit.args
            else:
                names = [a.name for a in unit.target._schema.arguments]  # type: ignore[union-attr]
                gate_up = graph.call(ingot.quantized_linear.default, *(None if n == "act" else argument(unit, n) for n in names))
                gate = argument(unit, "act")
        with graph.fx.inserting_before(node):
            replace(graph, node, graph.call(ingot.glu_quantized_linear.default, gate_up, gate, *(argument(node, n) for n in _KEPT)))
    return drop_unused(graph)


def _unit(node: fx.Node) -> fx.Node | None:
    """What makes the rows of a product that rounds them, and nothing else's: a unit, alone or behind a product that the library computes."""
    if not calls(node, ingot.quantized_linear.default) or argument(node, "activation") == "none":
        return None
    if any(argument(node, n) is not None for n in ("act", "eps", "zero")) or only_user(node.args[0]) is not node:  # type: ignore[arg-type]
        return None
    made: fx.Node = node.args[0]  # type: ignore[assignment]
    if calls(made, ingot.glu.default):
        return made
    if not calls(made, ingot.quantized_linear.default) or argument(made, "act") is None:
        return None
    form, activation, n = (argument(made, a) for a in ("format", "activation", "n"))
    x = made.args[0].meta["val"]  # type: ignore[union-attr]
    return made if multiplies_codes(form, activation, x.dtype, n, x.shape[-1]) else None


def example() -> Graph:
    def fn(x: torch.Tensor, gate_up: torch.Tensor, gate_up_scale: torch.Tensor, down: torch.Tensor, down_scale: torch.Tensor) -> list[torch.Tensor]:
        rounded = "fp8_e4m3_channel", "rows", "fp8_e4m3_token"
        h = ingot.quantized_linear(x, gate_up, gate_up_scale, None, None, None, None, "silu", *rounded, 64)
        return [ingot.quantized_linear(h, down, down_scale, None, None, None, x, None, *rounded, 16)]

    fp8, f32 = torch.float8_e4m3fn, torch.float32
    weights = {"gate_up": (fp8, (64, 16)), "gate_up_scale": (f32, (64,)), "down": (fp8, (16, 32)), "down_scale": (f32, (16,))}
    return from_function(fn, {"x": InputSpec(torch.bfloat16, ("T", 16))}, weights=weights)
