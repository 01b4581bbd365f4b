"""A quantized KV cache on the CPU, end to end: quality, sharing of prefixes, preemption, and what the manifest says."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ingot.artifacts.artifact import Artifact
from ingot.compiler.build import CompileError, CompileOptions, compile_model
from ingot.models.source import BUNDLED
from ingot.runtime.llm import LLM
from ingot.runtime.request import SamplingParams


@pytest.fixture(scope="module", params=["fp8", pytest.param("int8", marks=pytest.mark.nightly)])
def artifact(request: pytest.FixtureRequest, shared_home: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGOT_HOME", str(shared_home))
        options = CompileOptions(target="cpu", dtype="float32", kv_cache_dtype=request.param, max_num_seqs=16, max_num_batched_tokens=64)
        return compile_model("bundled", options).path


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Held-out text in pieces of 160 tokens."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode((BUNDLED / "heldout.txt").read_text()[:20_000]).ids
    return [ids[i : i + 160] for i in range(0, 4 * 160, 160)]


@pytest.fixture(scope="module")
def loss(prompts: list[list[int]]) -> float:
    """transformers' mean negative log-likelihood of the prompts, in float32."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_quality(artifact: Path, prompts: list[list[int]], loss: float) -> None:
    """Perplexity within 1% of the float cache's."""
    outputs = LLM(artifact).generate(prompts, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    logprobs = [p.logprob for o in outputs for p in (o.prompt_logprobs or [])[1:] if p is not None]
    assert len(logprobs) == len(prompts) * 159
    assert abs(-sum(logprobs) / len(logprobs) - loss) < 0.01


def test_prefixes_and_preemption(artifact: Path, prompts: list[list[int]]) -> None:
    """Pages that are shared or computed again say the same. Sums in another order may round one value of the cache to its neighbour, so a few
    tokens may differ."""
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    short = [p[:60] for p in prompts]

    def first_tokens(llm: LLM) -> list[int]:
        return [t for o in llm.generate(short, params) for t in o.outputs[0].token_ids[:8]]

    shared = LLM(artifact)
    calm, again = first_tokens(shared), first_tokens(shared)
    assert shared.engine.stats().prefix_hit_tokens > 0
    tight = LLM(artifact, num_pages=14, max_model_len=208, max_num_batched_tokens=16)
    preempted = first_tokens(tight)
    assert tight.engine.stats().preemptions > 0
    for other in (again, preempted):
        assert sum(a == b for a, b in zip(calm, other, strict=True)) >= 0.9 * len(calm)


def test_manifest(artifact: Path) -> None:
    """A byte an element, and a float32 a head, for k and v of every layer."""
    manifest = Artifact.open(artifact).manifest
    caches = [s for s in manifest.states if "_cache_" in s.name]
    heads, page_size, size = caches[0].shape
    [group] = manifest.groups
    assert group.bytes_per_unit == len(caches) * heads * page_size * (size + 4)
    dtype = {"fp8": "float8_e4m3fn", "int8": "int8"}[manifest.options.kv_cache_dtype]
    assert manifest.kv_layout == f"page:N,K,page_size,E/1 {dtype}, scales N,K,page_size float32"


def test_float8_without_its_instructions_is_refused() -> None:
    with pytest.raises(CompileError, match="use int8"):
        compile_model("bundled", CompileOptions(target="sm_86", kv_cache_dtype="fp8"))
