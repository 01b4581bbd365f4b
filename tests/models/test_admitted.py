"""Every architecture that the record admits is admitted, and the record is what is shown. The long tail is nightly."""

from __future__ import annotations

import pytest
import transformers

from ingot.models import oracle, tiny
from ingot.models.refusals import REASONS

# One of each way to be traced: plain decoders, positions, masks, experts, states, latents, adapters.
DAILY = frozenset(
    "arcee bart bloom cohere2 dbrx deepseek_v2 deepseek_v32 doge falcon falcon_h1 falcon_mamba gemma3_text glm gpt2 gpt_bigcode gpt_neo gpt_neox "
    "gptj hy_v4 jamba jetmoe kimi_linear lfm2 llama4_text longcat_flash minimax mpt nemotron_h olmo_hybrid openai-gpt opt phi phimoe qwen2_moe "
    "qwen3_5_text qwen3_moe qwen3_next recurrent_gemma roformer rwkv xglm zamba2 zaya".split()
)
ADMITTED = {v.model_type: v.architecture for v in oracle.load() if v.admitted}


@pytest.mark.parametrize("architecture", [pytest.param(a, id=m, marks=[] if m in DAILY else pytest.mark.nightly) for m, a in ADMITTED.items()])
def test_admitted(architecture: str) -> None:
    verdict = oracle.admit(architecture)
    assert verdict.admitted, verdict
    assert verdict.error is not None
    assert verdict.error < 1e-5


def test_enough_of_them() -> None:
    """Names that the record refuses, or does not know, would silently test nothing."""
    assert ADMITTED.keys() >= DAILY
    assert len(DAILY) >= 40
    assert len(ADMITTED) >= 133


def test_the_record_has_every_class_of_transformers() -> None:
    assert {v.architecture for v in oracle.load()} == {tiny.architecture_of(n) for n in tiny.names()}


def test_the_page_is_the_record() -> None:
    assert oracle.PAGE.read_text() == oracle.page(oracle.load(), oracle.load("embed"))
    assert transformers.__version__ in oracle.PAGE.read_text()


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_refused() -> None:
    """Refusals are looked at again: what works by now should be admitted."""
    recorded = {v.architecture: v.reason for v in oracle.load() if not v.admitted}
    assert {v.architecture: v.reason for v in oracle.run(recorded) if not v.admitted} == recorded


def test_reasons_are_words() -> None:
    """No reason is the bare name of an exception of the modeling code, and none is kept for what is admitted."""
    for verdict in oracle.load():
        assert not verdict.reason.split(":")[0].endswith(("Error", "Exception")), verdict
    assert set(REASONS) <= {v.architecture for v in oracle.load() if not v.admitted}


def test_the_pages_reasons_fit_a_table() -> None:
    verdicts = [oracle.Verdict("A", "a", True, ""), oracle.Verdict("B", "b", False, "two\nlines | and a bar")]
    page = oracle.page(verdicts, [oracle.Verdict("E", "e", True, "")]).splitlines()
    assert any(line.startswith("1 of the 2") for line in page)
    assert r"| B | `b` | two lines \| and a bar |" in page
    assert page[-1] == "| E | `e` |"
