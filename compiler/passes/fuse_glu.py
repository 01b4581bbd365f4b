"""act(x Wgᵀ) · (x Wuᵀ), spelled with two linears or with the halves of one, becomes `linear` + `glu`, or `linear_glu` in one."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import fx

from ingot.ops import Graph, InputSpec
from ingot.ops.target import Target

from ..from_function import from_function
from ..quantization import signature
from .match import aten, calls, column_slice, drop_unused, ingot, replace
from .merge_siblings import concatenate

ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu", aten.sigmoid.default: "sigmoid"}


def activation(node: fx.Node) -> str | None:
    """The dialect's name of the activation that a node computes."""
    if calls(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    return ACTIVATIONS.get(node.target) if node.op == "call_function" else None


def fuse_glu(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    for node in list(graph.fx.nodes):
        if not calls(node, aten.mul.Tensor) or not all(isinstance(a, fx.Node) for a in node.args):
            continue
        for gate, up in (node.args, node.args[::-1]):
            act = activation(gate)
            if act is not None and len(gate.users) == 1:
                with graph.fx.inserting_before(node):
                    fused = _two_linears(graph, gate.args[0], up, act) or _halves(graph, gate.args[0], up, act)
                if fused is not None:
                    replace(graph, node, fused)
                    break
    return drop_unused(graph)


def _two_linears(graph: Graph, gate: fx.Node, up: fx.Node, act: str) -> fx.Node | None:
    if not (calls(gate, ingot.linear.default) and calls(up, ingot.linear.default) and gate.args[0] is up.args[0]):
        return None
    weights = [gate.args[1], up.args[1]]
    if gate.args[2] is not None or up.args[2] is not None or gate is up or len(gate.users) + len(up.users) > 2:
        return None
    if any(w.name not in graph.weights or len(w.users) > 1 for w in weights) or weights[0].meta["val"].shape != weights[1].meta["val"].shape:
        return None
    if signature(graph, weights[0]) != signature(graph, weights[1]):
        return None
    return graph.call(ingot.linear_glu.default, gate.args[0], concatenate(graph, weights), act)


def _halves(graph: Graph, gate: fx.Node, up: fx.Node, act: str) -> fx.Node | None:
    if gate.meta["val"].dim() != 2:
        return None
    (base, begin, middle), (other, start, end) = column_slice(gate), column_slice(up)
    if base is not other or begin != 0 or start != middle or end != 2 * middle or end != base.meta["val"].shape[-1]:
        return None
    if calls(base, ingot.linear.default) and base.args[2] is None and base.args[1].name in graph.weights:
        return graph.call(ingot.linear_glu.default, base.args[0], base.args[1], act)
    return graph.call(ingot.glu.default, base, act)


def example() -> Graph:
    def fn(x: torch.Tensor, gate_proj_weight: torch.Tensor, up_proj_weight: torch.Tensor, gate_up: torch.Tensor) -> list[torch.Tensor]:
        gate, up = ingot.linear(x, gate_up, None).chunk(2, -1)
        gelu = functools.partial(F.gelu, approximate="tanh")
        return [F.silu(ingot.linear(x, gate_proj_weight, None)) * ingot.linear(x, up_proj_weight, None), up * gelu(gate)]

    f32 = torch.float32
    shapes = {"gate_proj_weight": (20, 24), "up_proj_weight": (20, 24), "gate_up": (36, 24)}
    return from_function(fn, {"x": InputSpec(f32, ("T", 24))}, weights={n: (f32, s) for n, s in shapes.items()})
