"""Weights on their way from a checkpoint into an artifact, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ingot.artifacts.artifact import ArtifactWriter
from ingot.models.checkpoint import Checkpoint, dummy, recipes
from ingot.models.checkpoint import pack as pack_tensor
from ingot.ops import Graph, Recipe, Weight

SEED = 0
"""Of dummy weights."""


def bind(graph: Graph, checkpoint: Checkpoint | None, config: Any) -> dict[str, Weight]:
    """The graph's weights with recipes over the checkpoint's tensors instead of the model's parameters; as they are without a checkpoint.

    CheckpointError lists what is missing, surplus or of a wrong shape: it is found here, before any long work.
    """
    if checkpoint is None:
        return graph.weights
    parameters = {w.recipe.params[0]: (w.shape, w.dtype) for w in graph.weights.values() if w.recipe.op == "tensor"}
    found = recipes(checkpoint, config, parameters)
    return {n: replace(w, recipe=_substitute(w.recipe, found)) for n, w in graph.weights.items()}


def _substitute(recipe: Recipe, found: dict[str, Recipe]) -> Recipe:
    if recipe.op == "tensor":
        return found[recipe.params[0]]
    return replace(recipe, inputs=tuple(_substitute(i, found) for i in recipe.inputs))


def pack(graph: Graph, checkpoint: Checkpoint | None, writer: ArtifactWriter, progress: Callable[[float], None]) -> float:
    """Write every weight of `graph`, whose recipes are bound when there is a checkpoint, to the artifact; returns GB/s of the writing."""
    out = writer.weights()
    for i, (name, weight) in enumerate(graph.weights.items()):
        progress(i / len(graph.weights))
        if not weight.recipe.sources:
            out.add(name, weight.recipe.run({}, graph.constants).to(weight.dtype), weight.recipe)
        elif checkpoint is None:
            out.add_seed(name, weight.dtype, weight.shape, dummy(name, weight, SEED))
        else:
            out.add(name, pack_tensor(weight.recipe, checkpoint, graph.constants, weight.dtype), weight.recipe)
    progress(1.0)
    return out.gigabytes_per_second
