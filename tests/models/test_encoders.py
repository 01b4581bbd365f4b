"""Encoders: packed equals alone, the oracle refuses what is not, and what the files beside a checkpoint say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

from ingot.models import oracle, sentence_transformers, tiny
from ingot.models.encoders import architecture, padding_id, position_offset
from ingot.models.frontend import build, entry_point, trace
from ingot.models.sentence_transformers import EmbeddingSettings, SentenceTransformersError
from ingot.ops import Graph

REQUIRED = ["BertModel", "RobertaModel", "XLMRobertaModel", "DistilBertModel", "ModernBertModel", "NomicBertModel"]


@pytest.mark.parametrize("name", REQUIRED)
def test_admits(name: str) -> None:
    verdict = oracle.admit(name)
    assert verdict.admitted, verdict
    assert verdict.error is not None and verdict.error < 2e-6


def spoiled(op: str, index: int, value: Callable[[fx.Node], object]) -> Callable[[Graph], Graph]:
    """A rewrite of one argument of the last call of `op`."""

    def rewrite(graph: Graph) -> Graph:
        node = [n for n in graph.fx.nodes if n.target is getattr(torch.ops.ingot, op).default][-1]
        args = list(node.args) + [0] * (index + 1 - len(node.args))
        args[index] = value(node)
        node.args = tuple(args)
        return graph

    return rewrite


@pytest.mark.parametrize(
    ("name", "rewrite"),
    [
        pytest.param("ModernBertModel", spoiled("packed_attention", 5, lambda n: n.args[5] - 1), id="a window that is one short"),
        pytest.param("ModernBertModel", spoiled("packed_attention", 5, lambda n: 0), id="no window"),
        pytest.param("BertModel", spoiled("packed_attention", 4, lambda n: 1.0), id="attention without its scale"),
        pytest.param("RobertaModel", spoiled("embedding", 0, lambda n: n.graph.find_nodes(op="placeholder")[1]), id="positions from 0"),
    ],
)
def test_refuses_a_spoiled_graph(name: str, rewrite: Callable[[Graph], Graph]) -> None:
    verdict = oracle.admit(name, rewrite)
    assert not verdict.admitted
    assert "embeddings of packed texts differ" in verdict.reason


def test_positions_begin_behind_the_padding() -> None:
    roberta = build(tiny.encoder_config("roberta", pad_token_id=1), torch.float32, "meta")
    assert (position_offset(roberta), padding_id(roberta)) == (2, 1)
    bert = build(tiny.encoder_config("bert"), torch.float32, "meta")
    assert (position_offset(bert), padding_id(bert)) == (0, -1)
    assert oracle.admit(tiny.encoder_config("roberta", pad_token_id=1)).admitted


def test_which_configs_are_encoders() -> None:
    assert [entry_point(tiny.of(n)) for n in ("BertModel", "bert", "llama")] == ["embed", "forward", "forward"]
    masked = tiny.encoder_config("bert")
    masked.architectures = ["BertForMaskedLM"]
    assert architecture(masked) == "BertModel"


def test_what_cannot_be_packed_is_refused() -> None:
    """FNet mixes all tokens of a batch, with no attention that could keep sequences apart."""
    verdict = oracle.admit("FNetModel")
    assert not verdict.admitted and verdict.reason


def test_an_embed_graph_has_no_state() -> None:
    graph = trace(tiny.of("BertModel"), dtype=torch.float32)
    assert (graph.entry_point, graph.states) == ("embed", {})
    assert set(graph.inputs) == {"input_ids", "positions", "cu_seqlens_q", "pooling"}


def test_the_record_has_what_must_be_admitted() -> None:
    record = {v.architecture: v for v in oracle.load("embed")}
    assert list(record) == sorted(record)
    assert all(record[name].admitted for name in REQUIRED)
    assert all(v.reason for v in record.values() if not v.admitted)


def write(folder: Path, steps: list[str], pooling: dict[str, object]) -> Path:
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    (folder / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{s}", "path": paths[s]} for s in steps]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8} | pooling))
    return folder


def test_settings_of_sentence_transformers(tmp_path: Path) -> None:
    assert sentence_transformers.read(tmp_path) == EmbeddingSettings("mean", True, None)
    write(tmp_path, ["Transformer", "Pooling"], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    assert sentence_transformers.read(tmp_path) == EmbeddingSettings("cls", False, 128)


@pytest.mark.parametrize(
    ("steps", "pooling", "message"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, "Dense is not supported"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "pooling by pooling_mode_max_tokens is not supported"),
        (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "one at a time"),
    ],
)
def test_other_ways_to_pool_are_refused(tmp_path: Path, steps: list[str], pooling: dict[str, object], message: str) -> None:
    with pytest.raises(SentenceTransformersError, match=message):
        sentence_transformers.read(write(tmp_path, steps, pooling))
