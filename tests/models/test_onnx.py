"""ONNX encoders as torch's own exporters write them, compiled; and files that are damaged, foreign or something else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from ingot.compiler.build import CompileError, CompileOptions, compile_model
from ingot.models import tiny
from ingot.models.onnx.file import OnnxFile, OnnxFileError
from ingot.models.onnx.frontend import OnnxEncoder
from ingot.models.onnx.source import resolve
from ingot.models.oracle import randomize
from ingot.runtime import Embedder


class Encoder(torch.nn.Module):
    """A model with the signature that exporters give encoders."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def export(model: torch.nn.Module, path: Path, dynamo: bool) -> Path:
    """Write `model` with torch's exporter: the one over torch.export, or the one over TorchScript."""
    randomize(model)
    ids = torch.randint(5, 90, (2, 9))
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["last_hidden_state"]}
    sizes = {0: "batch", 1: "sequence"}
    given = {"dynamic_shapes": ({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")},) * 2, "external_data": False, "verbose": False}
    if not dynamo:
        given = {"dynamic_axes": dict.fromkeys(("input_ids", "attention_mask", "last_hidden_state"), sizes), "opset_version": 17}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Encoder(model), (ids, torch.ones_like(ids)), str(path), **names, **given, dynamo=dynamo)
    return path


def model_of(name: str, attention: str = "sdpa", **overrides: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, name)._from_config(tiny.encoder_config(tiny.encoder_architectures()[name], **overrides), attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model_of("BertModel"), tmp_path_factory.mktemp("bert") / "bert.onnx", dynamo=True)


_EXPORTED = [
    (name, attention, dynamo)
    for name in ("BertModel", "DistilBertModel", "NomicBertModel", "RobertaModel", "ModernBertModel")
    for attention in ("eager", "sdpa")
    for dynamo in (True, False)
]
_ALWAYS = [("RobertaModel", "eager", False), ("ModernBertModel", "sdpa", True)]


@pytest.mark.parametrize(("name", "attention", "dynamo"), [pytest.param(*e, marks=() if e in _ALWAYS else pytest.mark.nightly) for e in _EXPORTED])
def test_exported_encoders(name: str, attention: str, dynamo: bool, tmp_path: Path) -> None:
    """`trace` compares packed texts with the reference implementation by itself; here what it found is checked."""
    encoder = OnnxEncoder(OnnxFile.open(export(model_of(name, attention), tmp_path / "model.onnx", dynamo)))
    graph = encoder.trace()
    assert (encoder.vocab_size, encoder.padding_id) == (128, 0 if name == "RobertaModel" else -1)
    assert encoder.max_positions == {"RobertaModel": 255, "ModernBertModel": None, "NomicBertModel": None}.get(name, 256)
    windows = {(*n.args, 0)[5] for n in graph.fx.nodes if n.target is torch.ops.ingot.packed_attention.default}
    assert windows == ({0, 5} if name == "ModernBertModel" else {0})
    assert all(n.args[0].meta["val"].dim() == 2 for n in graph.fx.nodes if n.target is torch.ops.ingot.linear.default)


def test_a_compiled_file_equals_onnxruntime(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_HOME", str(tmp_path))
    built = compile_model(str(bert), CompileOptions(target="cpu", max_num_seqs=4, max_num_batched_tokens=64))
    embedder = Embedder(built.path, num_threads=1)
    assert (embedder.model.name, embedder.model.architecture, embedder.max_model_len, embedder.info.dimensions) == ("bert", "OnnxEncoder", 64, 64)
    session = onnxruntime.InferenceSession(str(bert))
    texts = [torch.randint(5, 128, (n,)).tolist() for n in (1, 40, 9, 33, 16)]
    for text, vector in zip(texts, embedder.embed(texts, normalize=False), strict=True):
        [hidden] = session.run(None, {"input_ids": np.array([text]), "attention_mask": np.ones((1, len(text)), np.int64)})
        np.testing.assert_allclose(vector, hidden[0].mean(0), atol=1e-5)
    assert compile_model(str(bert), CompileOptions(target="cpu", max_num_seqs=4, max_num_batched_tokens=64)).hit
    with pytest.raises(CompileError, match="--dtype bfloat16"):
        compile_model(str(bert), CompileOptions(target="cpu", dtype="bfloat16"))


def changed(bert: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(str(bert))
    change(model)
    onnx.save(model, str(folder / "changed.onnx"))
    return folder / "changed.onnx"


def first(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op)


def set_op(op: str, to: str, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = first(model, op)
        del node.attribute[:]
        node.op_type, node.domain = to, domain
        if domain:
            model.opset_import.append(onnx.helper.make_opsetid(domain, 1))

    return change


def set_axis(model: onnx.ModelProto) -> None:
    first(model, "Softmax").attribute[0].i = 1


def rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "pixel_values"
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == "input_ids":
                node.input[i] = "pixel_values"


def keep_shape_alone(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "logits"
    dims = model.graph.output[0].type.tensor_type.shape.dim
    del dims[2]
    model.graph.node.append(onnx.helper.make_node("Squeeze", ["last_hidden_state", "axes"], ["logits"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "axes"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_op("Gelu", "Celu"), r"\(Celu\) has no counterpart in the dialect"),
        (set_op("Gelu", "FastGelu", "com.microsoft"), r"calls com.microsoft.FastGelu, and only standard ops are known"),
        (set_axis, r"\(Softmax\) is over another dim than the last"),
        (rename_input, r"has the inputs pixel_values, attention_mask; an encoder of texts has input_ids"),
        (keep_shape_alone, r"has the outputs logits; an encoder has last_hidden_state"),
    ],
)
def test_what_is_no_encoder_is_refused_by_name(bert: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], None], message: str) -> None:
    with pytest.raises(OnnxFileError, match=message):
        resolve(changed(bert, tmp_path, change))


def test_a_causal_mask_is_refused(tmp_path: Path) -> None:
    path = export(model_of("BertModel", "eager", is_decoder=True, use_cache=False), tmp_path / "decoder.onnx", dynamo=True)
    with pytest.raises(OnnxFileError, match=r"hides from attention something else than padding"):
        OnnxEncoder(OnnxFile.open(path)).trace()


def test_a_wrong_graph_does_not_get_through(bert: Path, tmp_path: Path) -> None:
    """What the translation gets wrong, the comparison with the reference implementation finds."""
    encoder = OnnxEncoder(OnnxFile.open(bert))
    name, attention = next(iter(encoder.attentions.items()))
    encoder.attentions[name] = type(attention)(attention.node, name, attention.q, attention.k_t, attention.v, 2 * attention.scale, attention.mask)
    with pytest.raises(OnnxFileError, match="embeddings of packed texts differ from those of the file"):
        encoder.trace()


@pytest.mark.parametrize("size", [0, 100, -1000])
def test_a_damaged_file_is_refused(bert: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(bert.read_bytes()[:size])
    with pytest.raises(OnnxFileError, match=r"damaged.onnx is not a whole ONNX file.*export it again"):
        resolve(path)


def test_a_file_that_is_not_there_or_not_onnx(tmp_path: Path) -> None:
    with pytest.raises(OnnxFileError, match="is not a whole ONNX file"):
        resolve(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("not a protobuf")
    with pytest.raises(OnnxFileError, match="is not a whole ONNX file"):
        resolve(tmp_path / "text.onnx")


def test_data_outside_the_folder_is_not_read(bert: Path, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret")

    model = onnx.load(str(bert))
    change(model)
    (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(OnnxFileError, match=r"keeps weights at ../secret, outside its folder"):
        resolve(tmp_path / "changed.onnx")
