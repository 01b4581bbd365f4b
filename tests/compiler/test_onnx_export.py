"""Graphs written as ONNX, run by onnxruntime, against transformers' own model on random inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ingot.artifacts.manifest import Embedding
from ingot.compiler.onnx.export import export_model, write
from ingot.compiler.onnx.unpack import unpack
from ingot.compiler.onnx.writer import OnnxError
from ingot.compiler.passes.clean_views import clean_views
from ingot.models import tiny
from ingot.models.frontend import build, trace
from ingot.models.oracle import randomize
from ingot.ops import Recipe
from ingot.ops.target import Target

CPU = Target("cpu", "x86-64:", "")


def exported(name: str, path: Path, pooling: str = "mean", **options: Any) -> tuple[torch.nn.Module, onnxruntime.InferenceSession]:
    """A tiny model with random weights, and a session of what was written of it."""
    config = tiny.of(name)
    model = build(config, torch.float32, "cpu")
    randomize(model)
    graph, tensors = clean_views(trace(config, dtype=torch.float32), CPU), model.state_dict(keep_vars=True)
    write(graph, lambda n: graph.weights[n].recipe.run(tensors, graph.constants), path, Embedding(64, pooling, True, -1), **options)
    onnx.checker.check_model(str(path), full_check=True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return model, onnxruntime.InferenceSession(str(path), settings)


@pytest.mark.parametrize(("name", "pooling"), [("BertModel", "mean"), ("RobertaModel", "cls"), ("ModernBertModel", "last")])
def test_encoder(name: str, pooling: str, tmp_path: Path) -> None:
    model, session = exported(name, tmp_path / "model.onnx", pooling)
    lengths = (11, 7, 23)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 128, mask.shape) * mask
    hidden, pooled = session.run(["last_hidden_state", "sentence_embedding"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    for i, n in enumerate(lengths):
        with torch.no_grad():
            expected = model(input_ids=ids[i : i + 1, :n]).last_hidden_state[0].numpy()
        assert np.abs(hidden[i, :n] - expected).max() < 2e-6 * np.abs(expected).max()
        vector = {"mean": expected.mean(0), "cls": expected[0], "last": expected[-1]}[pooling]
        np.testing.assert_allclose(pooled[i], vector / np.linalg.norm(vector), atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("phi3", "gpt2", "stablelm"))])
def test_decoder_in_steps(name: str, tmp_path: Path) -> None:
    """A prompt, single tokens, a chunk; past keys and values go round. One row of the batch is padded on the left."""
    model, session = exported(name, tmp_path / "model.onnx")
    length, padding = 21, 4
    ids = torch.randint(5, 100, (2, length))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = [model(input_ids=row[None], use_cache=False).logits[0].numpy() for row in (ids[0], ids[1, padding:])]
    past = {i.name: np.zeros([2, i.shape[1], 0, i.shape[3]], np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    assert past
    names = [o.name for o in session.get_outputs()]
    for begin, end in ((0, 12), (12, 13), (13, 14), (14, length)):
        inputs = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        outputs = dict(zip(names, session.run(None, {n: v.numpy() for n, v in inputs.items()} | past), strict=True))
        past = {n: outputs[n.replace("past_key_values", "present")] for n in past}
        largest = max(np.abs(e).max() for e in expected)
        assert np.abs(outputs["logits"][0] - expected[0][begin:end]).max() < 5e-6 * largest
        first = max(begin, padding)
        assert np.abs(outputs["logits"][1, first - begin :] - expected[1][first - padding : end - padding]).max() < 5e-6 * largest


def test_many_bytes_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    model, session = exported("BertModel", tmp_path / "model.onnx", external_bytes=1)
    assert (tmp_path / "model.onnx.data").stat().st_size > 100_000
    assert (tmp_path / "model.onnx").stat().st_size < 100_000
    ids = torch.randint(5, 128, (1, 5))
    [hidden] = session.run(["last_hidden_state"], {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 5), np.int64)})
    with torch.no_grad():
        np.testing.assert_allclose(hidden, model(input_ids=ids).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [("mixtral", r"these ops have no ONNX form: .*ingot\.moe.*nothing was written"), ("mamba2", r"no ONNX form: .*ingot\.ssd_scan")],
)
def test_an_op_without_a_form_is_named_before_anything_is_written(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match=message):
        exported(name, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match=r"cannot write .*absent/model.onnx: No such file"):
        export_model("bundled", tmp_path / "absent" / "model.onnx")


def test_weights_are_taken_out_of_packed_ones() -> None:
    tensors = {"a": torch.randn(4, 3), "b": torch.randn(2, 3), "c": torch.randn(3, 6), "d": torch.randn(2, 3)}
    leaf = {n: Recipe("tensor", (n,)) for n in tensors}
    merged = Recipe("cat", (0,), (leaf["a"], Recipe("stack", (0,), (Recipe("reshape", (3,), (Recipe("slice", (0, 0, 1), (leaf["b"],)),)),)), leaf["d"]))
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    simple = Recipe("cat", (0,), (leaf["a"], Recipe("transpose", (0, 1), (Recipe("reshape", (3, 6), (leaf["c"],)),))))
    for name, tensor in unpack("w", simple, simple.run(tensors, {}), shapes).items():
        assert torch.equal(tensor, tensors[name])
    with pytest.raises(OnnxError, match="made by 'slice', which cannot be undone"):
        unpack("w", merged, merged.run(tensors, {}), shapes)
