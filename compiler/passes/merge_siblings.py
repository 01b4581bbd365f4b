"""Linears that read the same rows become one linear over concatenated weights: Q, K, V; gate and up.

One pass over x and one launch serve all of them. A weight that has another reader (a tied embedding) stays alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ingot.ops import Graph, InputSpec, Recipe, Weight
from ingot.ops.target import Target

from ..from_function import from_function
from ..quantization import signature
from .match import aten, calls, drop_unused, ingot

MERGED_NAMES = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


def merge_siblings(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    siblings: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.fx.nodes:
        if calls(node, ingot.linear.default) and _mergeable(node, graph):
            siblings.setdefault(node.args[0], []).append(node)
    for group in siblings.values():
        kinds = {n: _kind(n, graph) for n in group}
        for kind in dict.fromkeys(kinds.values()):
            alike = [n for n in group if kinds[n] == kind]
            if len(alike) > 1:
                _merge(graph, alike)
    return drop_unused(graph)


def _mergeable(node: fx.Node, graph: Graph) -> bool:
    return all(w is None or (w.name in graph.weights and len(w.users) == 1) for w in node.args[1:])


def _kind(node: fx.Node, graph: Graph) -> tuple[Any, ...]:
    """Equal for linears whose weights can be one."""
    return node.args[1].meta["val"].dtype, node.args[2] is not None, signature(graph, node.args[1])  # type: ignore[union-attr, arg-type]


def _merge(graph: Graph, nodes: list[fx.Node]) -> None:
    with graph.fx.inserting_before(nodes[0]):
        parameters = [concatenate(graph, [n.args[i] for n in nodes]) if nodes[0].args[i] is not None else None for i in (1, 2)]  # type: ignore[misc]
        merged = graph.call(ingot.linear.default, nodes[0].args[0], *parameters)
        widths = [n.args[1].meta["val"].shape[0] for n in nodes]  # type: ignore[union-attr]
        split = graph.call(aten.split_with_sizes.default, merged, widths, -1)
        for i, node in enumerate(nodes):
            part = graph.getitem(split, i)
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.fx.erase_node(node)


def concatenate(graph: Graph, parts: list[fx.Node]) -> fx.Node:
    """A weight placeholder that holds `parts` one after another along dim 0."""
    weights = [graph.weights[p.name] for p in parts]
    recipe = Recipe("cat", (0,), tuple(w.recipe for w in weights))
    shape = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])
    return graph.add_weight(merged_name([p.name for p in parts]), Weight(recipe, weights[0].dtype, shape))


def merged_name(names: list[str]) -> str:
    """layers_0_q_proj_weight, …k_proj…, …v_proj… → layers_0_qkv_proj_weight."""
    for parts, merged in MERGED_NAMES.items():
        if len(parts) == len(names) and all(p in n for p, n in zip(parts, names, strict=True)):
            return names[0].replace(parts[0], merged)
    return "__".join([names[0], *(n.removesuffix("_weight").split("_")[-1] if n.endswith("_weight") else n for n in names[1:])])


def example() -> Graph:
    def fn(x: torch.Tensor, q_proj_weight: torch.Tensor, k_proj_weight: torch.Tensor, v_proj_weight: torch.Tensor) -> list[torch.Tensor]:
        return [ingot.linear(x, w, None) for w in (q_proj_weight, k_proj_weight, v_proj_weight)]

    f32 = torch.float32
    return from_function(fn, {"x": InputSpec(f32, ("T", 24))}, weights={f"{n}_proj_weight": (f32, (o, 24)) for n, o in (("q", 16), ("k", 8), ("v", 8))})
