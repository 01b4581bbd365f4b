"""Random small configs of five families. Lowered, each must equal transformers' model as the oracle serves it; compiled for the CPU,
the engine's log probabilities must. `make test` draws a few; the long profile is nightly."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ingot.compiler.build import CompileOptions, compile_model
from ingot.compiler.pipeline import lower
from ingot.models import oracle, tiny
from ingot.ops import Graph
from ingot.ops.target import host
from ingot.runtime.llm import LLM
from ingot.runtime.request import SamplingParams

FAMILIES = ("llama", "qwen3", "gemma3_text", "mixtral", "deepseek_v3")
PATIENT = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@st.composite
def configs(draw: DrawFn, family: str) -> PretrainedConfig:
    """Head counts and their ratio, head sizes that are no power of two, odd widths, vocabularies, windows, ties."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads, head_dim = kv_heads * group, draw(st.sampled_from([4, 8, 10, 16, 24, 34]))
    sizes: dict[str, Any] = {
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": heads * 2 * draw(st.integers(2, 12)),  # transformers wants a multiple of the heads
        "intermediate_size": draw(st.integers(3, 130)),
        "vocab_size": draw(st.integers(100, 301)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    match family:
        case "qwen3":
            sizes |= {"layer_types": ["full_attention"] * sizes["num_hidden_layers"]}
        case "gemma3_text":
            layers = draw(st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=1, max_size=3))
            sizes |= {"sliding_window": draw(st.integers(2, 20)), "layer_types": layers, "num_hidden_layers": len(layers)}
        case "mixtral":
            experts = draw(st.integers(1, 5))
            sizes |= {"num_local_experts": experts, "num_experts_per_tok": draw(st.integers(1, experts))}
            sizes |= {"sliding_window": draw(st.one_of(st.none(), st.integers(2, 20)))}
            # transformers' own product of experts wants rows of 16 bytes
            sizes |= {"hidden_size": heads * 4 * draw(st.integers(1, 6)), "intermediate_size": 4 * draw(st.integers(1, 30))}
        case "deepseek_v3":
            rope = draw(st.sampled_from([4, 8, 16]))
            sizes |= {"num_key_value_heads": heads, "head_dim": rope, "qk_rope_head_dim": rope, "qk_nope_head_dim": head_dim}
            sizes |= {"v_head_dim": draw(st.integers(3, 20)), "kv_lora_rank": draw(st.integers(5, 40)), "qk_head_dim": rope + head_dim}
            sizes |= {"q_lora_rank": draw(st.one_of(st.none(), st.integers(5, 30)))}
    return tiny.config(family, **sizes)


def lowers(config: PretrainedConfig) -> None:
    def lowered(graph: Graph) -> Graph:
        return lower(graph, host())[0]

    verdict = oracle.admit(config, lowered)
    assert verdict.admitted, f"{verdict.reason}\n{config}"
    assert verdict.error is not None
    assert verdict.error < 2e-5, config


def compiles(config: PretrainedConfig, folder: Path) -> None:
    """Prompts in one batch, chunked; the log probability of every prompt token and of a few greedy ones."""
    # torch's grouped product takes no matrix whose rows are not 16 bytes apart
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
    oracle.randomize(model)
    model.save_pretrained(folder)
    built = compile_model(str(folder), CompileOptions(target="cpu", dtype="float32", max_num_seqs=2, max_num_batched_tokens=16))
    llm = LLM(built.path)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 100, (n,), generator=generator).tolist() for n in (2, 21)]
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        answer = output.outputs[0]
        ids = torch.tensor([*prompt, *answer.token_ids])
        with torch.no_grad():
            expected = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        found = [t.logprob for t in [*(output.prompt_logprobs or [])[1:], *(answer.logprobs or [])] if t is not None]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=2e-4)


@pytest.fixture(autouse=True)
def home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_HOME", str(shared_home))


@pytest.mark.parametrize("family", FAMILIES)
def test_lowered(family: str) -> None:
    @settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=PATIENT, phases=[Phase.generate])
    @given(configs(family))
    def check(config: PretrainedConfig) -> None:
        lowers(config)

    check()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_many(family: str) -> None:
    @settings(max_examples=20, deadline=None, suppress_health_check=PATIENT)
    @given(configs(family))
    def check(config: PretrainedConfig) -> None:
        lowers(config)

    check()


@pytest.mark.parametrize("family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.nightly) for f in FAMILIES])
def test_compiled(family: str) -> None:
    @settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=PATIENT, phases=[Phase.generate])
    @given(configs(family))
    def check(config: PretrainedConfig) -> None:
        with TemporaryDirectory() as folder:
            compiles(config, Path(folder))

    check()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_many(family: str) -> None:
    @settings(max_examples=4, deadline=None, suppress_health_check=PATIENT)
    @given(configs(family))
    def check(config: PretrainedConfig) -> None:
        with TemporaryDirectory() as folder:
            compiles(config, Path(folder))

    check()
