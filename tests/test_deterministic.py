"""--deterministic: what a request gets, to the last bit, does not depend on what runs beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PhimoeConfig

from ingot.compiler.build import CompileError, CompileOptions, compile_model
from ingot.models import tiny
from ingot.models.source import BUNDLED
from ingot.runtime.llm import LLM
from ingot.runtime.request import SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=3, prompt_logprobs=1)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.nightly)])
def test_alone_and_in_company_are_equal_bit_for_bit(dtype: str, shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_HOME", str(shared_home))
    options = CompileOptions(target="cpu", dtype=dtype, max_num_seqs=16, max_num_batched_tokens=96, deterministic=True)
    llm = LLM(compile_model("bundled", options).path, enable_prefix_caching=False)
    text = (BUNDLED / "heldout.txt").read_text()
    prompts = [llm.engine.tokenizer.encode(text[i * 500 : i * 500 + 20 + 45 * i]) for i in range(9)]
    together = llm.generate(prompts, PARAMS)
    for prompt, among in zip(prompts[::3], together[::3], strict=True):
        [alone] = llm.generate([prompt], PARAMS)
        assert alone.outputs[0].token_ids == among.outputs[0].token_ids
        assert alone.outputs[0].logprobs == among.outputs[0].logprobs
        assert alone.prompt_logprobs == among.prompt_logprobs


def test_experts_do_not_depend_on_who_else_chose_them(shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_HOME", str(shared_home))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny.config("mixtral"), dtype=torch.float32).save_pretrained(tmp_path)
    options = CompileOptions(target="cpu", dtype="bfloat16", max_num_seqs=8, max_num_batched_tokens=48, deterministic=True)
    llm = LLM(compile_model(str(tmp_path), options).path, enable_prefix_caching=False)
    prompts = [torch.randint(3, 90, (n,)).tolist() for n in (1, 20, 7, 45, 3)]
    together = llm.generate(prompts, PARAMS)
    for prompt, among in zip(prompts, together, strict=True):
        [alone] = llm.generate([prompt], PARAMS)
        assert alone.outputs[0].logprobs == among.outputs[0].logprobs
        assert alone.prompt_logprobs == among.prompt_logprobs


def test_what_has_no_kernel_of_a_fixed_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_HOME", str(tmp_path / "home"))
    PhimoeConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=64, num_local_experts=2,
                 architectures=["PhimoeForCausalLM"]).save_pretrained(tmp_path / "phimoe")  # fmt: skip
    with pytest.raises(CompileError, match=r"--deterministic: on cpu.* no generated kernel computes .*aten\.gather"):
        compile_model(str(tmp_path / "phimoe"), CompileOptions(target="cpu", dtype="float32", deterministic=True, dummy_weights=True, max_num_seqs=4))
