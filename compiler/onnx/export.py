"""`ingot export --onnx`: the traced graph of a model, before anything is fused for a target, as a file of standard ONNX ops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ingot.artifacts import weights as packed
from ingot.artifacts.artifact import Artifact
from ingot.artifacts.manifest import Embedding
from ingot.models import source
from ingot.models.checkpoint import Checkpoint
from ingot.models.checkpoint import pack as pack_tensor
from ingot.models.frontend import entry_point, trace
from ingot.ops import Graph
from ingot.ops.graph import target_name
from ingot.ops.target import host

from ..embedding import describe
from ..passes.clean_views import clean_views
from ..pipeline import lower
from ..weights import bind
from .batch import Batch
from .lowerings import LOWERINGS
from .unpack import unpack
from .writer import EXTERNAL_BYTES, OnnxError, OnnxGraph, Value

_F32 = torch.float32


def export_model(model: str, path: Path, *, trust_remote_code: bool = False) -> None:
    """Write `model` (a folder, a hub id, or "bundled") to `path`, in float32.

    OnnxError names what has no ONNX form, before anything is written; CheckpointError, what does not fit.
    """
    found = source.resolve(model, trust_remote_code=trust_remote_code)
    graph = _traced(found.config)
    checkpoint = Checkpoint.open(found.folder)
    bound = bind(graph, checkpoint, found.config)
    read = lambda name: pack_tensor(bound[name].recipe, checkpoint, graph.constants, bound[name].dtype)
    write(graph, read, path, describe(graph, found) if graph.entry_point == "embed" else None)


def export_artifact(root: Path, path: Path) -> None:
    """Write the model that was compiled to the artifact at `root`, in float32: traced again, its weights taken out of the packed ones."""
    artifact = Artifact.open(root)
    manifest = artifact.manifest
    if manifest.options.quantize != "none":
        raise OnnxError(f"{root} has {manifest.options.quantize} weights, which have no ONNX form here; export the model that it was compiled from")
    config = source.read_config(artifact.path("config.json"))
    graph = _traced(config)
    lowered, _ = lower(trace(config, dtype=getattr(torch, manifest.options.dtype)), manifest.target)
    tensors = packed.load(artifact, "cpu")
    if missing := sorted(lowered.weights.keys() - tensors.keys()):
        raise OnnxError(f"{root} lays its weights out in another way than this Ingot ({', '.join(missing[:3])}); export the model that it was compiled from")
    pieces: dict[str, torch.Tensor] = {}
    shapes = {w.recipe.params[0]: w.shape for w in graph.weights.values() if w.recipe.op == "tensor"}
    for name, weight in lowered.weights.items():
        pieces |= unpack(name, weight.recipe, tensors[name], shapes)

    def read(name: str) -> torch.Tensor:
        recipe = graph.weights[name].recipe
        return pieces[recipe.params[0]] if recipe.op == "tensor" else recipe.run({}, graph.constants)

    write(graph, read, path, manifest.embedding)


def _traced(config: Any) -> Graph:
    if entry_point(config) == "forward" and getattr(config, "quantization_config", None):
        raise OnnxError("the checkpoint is quantized, and its formats have no ONNX form here; export an unquantized checkpoint of this model")
    return clean_views(trace(config, dtype=_F32), host())


def write(graph: Graph, read: Callable[[str], torch.Tensor], path: Path, embedding: Embedding | None, external_bytes: int = EXTERNAL_BYTES) -> None:
    """Write a traced float32 graph; `read` gives its weights by name, `embedding` says how an encoder pools.

    OnnxError names every op that has no ONNX form, before the file is begun.
    """
    g = OnnxGraph()
    batch = Batch(g, graph)
    table: dict[str, Any] = LOWERINGS | {f"ingot.{n}": getattr(batch, n) for n in ("packed_attention", "kv_write", "paged_attention", "gather_rows", "pool")}
    calls = [n for n in graph.fx.nodes if n.op == "call_function"]
    if unknown := sorted({target_name(n.target) for n in calls} - table.keys()):
        raise OnnxError(f"these ops have no ONNX form: {', '.join(unknown)}; nothing was written")
    values: dict[fx.Node, Any] = {graph.placeholders[n]: v for n, v in batch.placeholders().items()}
    names = {}
    for name, weight in graph.weights.items():
        original = Value(weight.recipe.params[0] if weight.recipe.op in ("tensor", "constant") else name)
        g.weights[original], names[original] = (weight.dtype, weight.shape), name
        values[graph.placeholders[name]] = original
    for node in calls:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        values[node] = table[target_name(node.target)](g, node, *args, **kwargs)
    batch.results(values, embedding)
    g.save(path, lambda original: read(names[original]), external_bytes)
