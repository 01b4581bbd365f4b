"""What an artifact records about the embeddings of its encoder."""

from __future__ import annotations

import torch

from ingot.artifacts.manifest import Embedding
from ingot.models import encoders, sentence_transformers
from ingot.models.frontend import build
from ingot.models.source import ModelSource
from ingot.ops import Graph


def longest_text(source: ModelSource) -> int:
    """The most tokens of a text: as many as there are positions, or as the checkpoint's sentence-transformers files allow."""
    positions = int(getattr(source.config, "max_position_embeddings", None) or 1 << 20)
    settings = sentence_transformers.read(source.folder)
    offset = encoders.position_offset(build(source.config, torch.float32, "meta"))
    return min(positions - offset, settings.max_seq_length or positions)


def describe(graph: Graph, source: ModelSource) -> Embedding:
    """The manifest's record of the entry point `embed` of `graph`."""
    settings = sentence_transformers.read(source.folder)
    pooled = graph.fx.output_node().args[0][0]
    padding = encoders.padding_id(build(source.config, torch.float32, "meta"))
    return Embedding(int(pooled.meta["val"].shape[1]), settings.pooling, settings.normalize, padding)
