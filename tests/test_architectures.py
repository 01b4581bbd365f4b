"""The whole path for what the bundled model does not have: experts, latents, windows, sinks, recurrent states, and several groups of them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ingot.compiler.build import CompileOptions, compile_model
from ingot.models import tiny
from ingot.models.oracle import randomize
from ingot.runtime.engine import EngineOptions
from ingot.runtime.llm import LLM
from ingot.runtime.load import load_engine
from ingot.runtime.request import SamplingParams


@pytest.fixture(scope="module", autouse=True)
def home(shared_home: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGOT_HOME", str(shared_home))
        yield


DAILY = ["mixtral", "deepseek_v3", "gemma2", "gpt_oss", "mamba2", "qwen3_next", "falcon_h1"]
NIGHTLY = [
    "bloom",
    "deepseek_v2",
    "deepseek_v32",
    "falcon",
    "gemma3_text",
    "jamba",
    "kimi_linear",
    "llama4_text",
    "longcat_flash",
    "minimax",
    "nemotron_h",
    "recurrent_gemma",
    "rwkv",
]


RECURRENT = {"mamba2", "qwen3_next", "falcon_h1", "jamba", "kimi_linear", "minimax", "nemotron_h", "recurrent_gemma", "rwkv"}


@pytest.mark.parametrize("model_type", [*DAILY, *(pytest.param(m, marks=pytest.mark.nightly) for m in NIGHTLY)])
def test_compiled_greedy_equals_transformers(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.config(model_type), dtype=torch.float32, attn_implementation="eager").eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    built = compile_model(str(tmp_path), CompileOptions(target="cpu", dtype="float32", max_num_seqs=4, max_num_batched_tokens=16))
    llm = LLM(built.path)
    prompts = [torch.randint(3, 90, (n,)).tolist() for n in (1, 9, 30)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert list(output.outputs[0].token_ids) == ids[len(prompt) :]
    # once more, from pages that are in the cache: of windows those before the prefix' end
    again = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in outputs]
    assert (llm.engine.stats().prefix_hit_tokens > 0) == (model_type not in RECURRENT)
    stages: list[str] = []
    load_engine(built.path, EngineOptions(), lambda stage, done: stages.append(stage))
    assert any("prefix caching is off: the model keeps a recurrent state" in stage for stage in stages) == (model_type in RECURRENT)
