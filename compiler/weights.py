"""Weights on their way from a checkpoint into an artifact, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ingot.artifacts.artifact import ArtifactWriter
from ingot.artifacts.weights import recipe_to_json
from ingot.models.checkpoint import Checkpoint, check_finite, dummy, recipes
from ingot.models.checkpoint import pack as pack_tensor
from ingot.models.frontend import build
from ingot.ops import Graph, Recipe, Weight

SEED = 0
"""Of dummy weights."""


def bind(graph: Graph, checkpoint: Checkpoint | None, config: Any) -> dict[str, Weight]:
    """The graph's weights with recipes over the checkpoint's tensors instead of the model's parameters; as they are without a checkpoint.

    CheckpointError lists what is missing, surplus or of a wrong shape: it is found here, before any long work.
    """
    if checkpoint is None:
        return graph.weights
    parameters = {source: (w.shape, w.dtype) for w in graph.weights.values() for source in w.recipe.sources}
    found = recipes(checkpoint, config, parameters, build(config, torch.float32, "meta"))
    return {n: replace(w, recipe=w.recipe.substituted(found)) for n, w in graph.weights.items()}


def final_recipe(name: str, weight: Weight, checkpoint: Checkpoint | None) -> Recipe:
    """What the artifact records: the recipe over the checkpoint's tensors, or a seed."""
    return dummy(name, weight, SEED) if checkpoint is None and weight.recipe.sources else weight.recipe


def described(graph: Graph, checkpoint: Checkpoint | None) -> dict[str, tuple[str, tuple[int, ...], object]]:
    """Name → (dtype, shape, recipe as JSON): equal descriptions of one checkpoint are equal weights."""
    return {n: (str(w.dtype).removeprefix("torch."), tuple(w.shape), recipe_to_json(final_recipe(n, w, checkpoint))) for n, w in graph.weights.items()}


def pack(graph: Graph, checkpoint: Checkpoint | None, writer: ArtifactWriter, progress: Callable[[float], None]) -> float:
    """Write every weight of `graph`, whose recipes are bound when there is a checkpoint, to the artifact; returns GB/s of the writing.

    CheckpointError names the tensor that holds NaN or infinity.
    """
    out = writer.weights()
    memo: dict[Any, Any] = {}
    made_from: tuple[Recipe, ...] = ()
    for i, (name, weight) in enumerate(graph.weights.items()):
        progress(i / len(graph.weights))
        recipe = final_recipe(name, weight, checkpoint)
        if recipe.op == "seed":
            out.add_seed(name, weight.dtype, weight.shape, recipe)
        elif checkpoint is None or not recipe.sources:
            out.add(name, recipe.run({}, graph.constants).to(weight.dtype), recipe)
        else:
            if recipe.reshaped.inputs != made_from:  # the parts of a weight follow one another
                memo, made_from = {}, recipe.reshaped.inputs
            packed = pack_tensor(recipe, checkpoint, graph.constants, weight.dtype, memo=memo)
            check_finite(packed, recipe, checkpoint)
            out.add(name, packed, recipe)
    progress(1.0)
    return out.gigabytes_per_second
