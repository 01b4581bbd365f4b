"""The whole path with quantized weights on the CPU: the compiled model is close to the original, and `inspect` tells what runs."""

import math
from pathlib import Path

import pytest

from ingot.artifacts.artifact import Artifact
from ingot.compiler.build import CompileOptions, compile_model
from ingot.models.source import BUNDLED
from ingot.runtime.llm import LLM
from ingot.runtime.request import SamplingParams
from ingot.serve.commands.inspect import describe


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGOT_HOME", str(tmp_path_factory.mktemp("home")))
        return compile_model("bundled", CompileOptions(target="cpu", quantize="int4-g128", max_num_seqs=4, max_num_batched_tokens=64)).path


def test_held_out_text_is_as_probable_as_it_should_be(artifact: Path) -> None:
    llm = LLM(artifact)
    assert llm.engine.tokenizer is not None
    ids = llm.engine.tokenizer.encode("<|endoftext|>" + (BUNDLED / "heldout.txt").read_text()[:4000])[:700]
    entries = llm.generate(ids, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    assert entries is not None
    loss = -sum(e.logprob for e in entries[1:] if e is not None) / (len(ids) - 1)
    assert math.isclose(loss, FLOAT_LOSS, rel_tol=0.05)


FLOAT_LOSS = 2.5463
"""Of transformers' model in bfloat16 on the same tokens."""


def test_inspect_shows_each_layer(artifact: Path) -> None:
    layers = describe(Artifact.open(artifact))["layers"]
    assert [(layer["format"], layer["activation"]) for layer in layers] == [("int4_group128", "int8_group128")] * 4 * 8 + [("int8_channel", "int8_group128")]
    assert all(layer["backend"] == "tvm" and layer["gate"].startswith("passed(cpu, ") for layer in layers)
    # 4 bits a code and a scale of 16 bits for 128 of them
    assert layers[2]["bytes"] == 2 * 1024 * 256 * (1 / 2 + 2 / 128)
    assert layers[-1]["weight"] == "model_embed_tokens_weight_of_linear"
