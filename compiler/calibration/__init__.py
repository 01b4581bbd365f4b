"""Weights rounded with a text at hand: the traced graph runs over it once, and at each linear what comes in says how to round its weight.

Nothing but the values that are still to be read, one weight, and what was seen of one input are in memory at a time; what was found goes
to a scratch folder, and the weights' recipes read it from there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import fx

from ingot.models.checkpoint import Checkpoint
from ingot.ops import Graph
from ingot.ops.graph import Recipe

from .algorithm import ALGORITHMS, Algorithm, Inputs, to_round
from .forward import Forward, step_inputs
from .text import CalibrationError, windows

__all__ = ["ALGORITHMS", "CalibrationError", "calibrate", "windows"]

for _name in ("awq", "gptq"):
    importlib.import_module(f"{__name__}.{_name}")

_LINEAR = torch.ops.ingot.linear.default


def calibrate(
    graph: Graph,
    checkpoint: Checkpoint,
    algorithm: str,
    texts: list[list[int]],
    folder: Path,
    mark: str,
    device: torch.device,
    progress: Callable[[float], None],
) -> tuple[Graph, Checkpoint]:
    """The graph with its rounded weights rounded better, and the checkpoint with what they are then made of, whose files are in `folder`.

    graph: traced, its weights bound to `checkpoint`, those to be rounded by recipes that quantize. texts: token ids of each sequence, of
    equal length. mark: names what is calibrated with, in the recipes, so that others are not taken for these.
    """
    graph = graph.copy()
    forward = Forward(graph, checkpoint, device)
    found = ALGORITHMS[algorithm](graph, forward)
    groups = siblings(graph)
    nodes = list(graph.fx.nodes)
    remaining = {n: len(group) for n, group in groups.items()}

    def before(node: fx.Node) -> None:
        x = node.args[0] if node.target is _LINEAR else None
        if x in groups and remaining[x] == len(groups[x]):
            found.at(groups[x], Inputs.of(forward.values[x]))
            remaining[x] = 0
        progress(nodes.index(node) / len(nodes))

    forward.run(step_inputs(graph, texts, device), before)
    return graph, _recorded(graph, checkpoint, found, folder, mark)


def siblings(graph: Graph) -> dict[fx.Node, list[fx.Node]]:
    """The linears that read each value and whose weights are rounded."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.fx.nodes:
        if node.target is _LINEAR and node.args[1].name in graph.weights and to_round(graph.weights[node.args[1].name].recipe):
            groups.setdefault(node.args[0], []).append(node)
    return groups


def _recorded(graph: Graph, checkpoint: Checkpoint, found: Algorithm, folder: Path, mark: str) -> Checkpoint:
    """Let the recipes of what was found read it from files."""
    for name, tensors in found.stored(folder):
        weight = graph.weights[name]
        names = [f"calibrated/{mark}/{name}/{part}" for part in tensors]
        inputs = tuple(Recipe("tensor", (n,)) for n in names)
        graph.weights[name] = replace(weight, recipe=inputs[0] if len(inputs) == 1 else replace(weight.recipe, inputs=inputs))
    return checkpoint.with_files(folder, f"calibrated/{mark}/")
