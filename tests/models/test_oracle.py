"""The oracle admits what it must, and refuses what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from ingot.compiler.passes.clean_views import clean_views
from ingot.models import oracle, tiny
from ingot.ops import Graph
from ingot.ops.target import Target

REQUIRED = "llama qwen2 qwen3 mistral gemma2 phi3 olmo2 starcoder2 mixtral deepseek_v3 mamba2 gpt_oss".split()
CPU = Target("cpu", "x86-64:", "")


@pytest.mark.parametrize("model_type", REQUIRED)
def test_admits(model_type: str) -> None:
    """With the views cleaned, as every graph is before it is lowered."""
    verdict = oracle.admit(model_type, lambda graph: clean_views(graph, CPU))
    assert verdict.admitted, verdict
    assert verdict.error is not None
    assert verdict.error < 1e-5


def with_argument(op: str, index: int, value: Callable[[fx.Node], object]) -> Callable[[Graph], Graph]:
    """A rewrite that spoils one argument of the first call of `op`."""

    def rewrite(graph: Graph) -> Graph:
        node = next(n for n in graph.fx.nodes if n.target is getattr(torch.ops.ingot, op).default)
        args = list(node.args) + [None] * (index + 1 - len(node.args))
        args[index] = value(node)
        node.args = tuple(args)
        return graph

    return rewrite


@pytest.mark.parametrize(
    ("model_type", "rewrite"),
    [
        pytest.param("mistral", with_argument("paged_attention", 9, lambda n: n.args[9] - 1), id="a window that is one short"),
        pytest.param("mistral", with_argument("paged_attention", 9, lambda n: 0), id="no window"),
        pytest.param("gpt_oss", with_argument("paged_attention", 6, lambda n: None), id="dropped sinks"),
        pytest.param("llama", with_argument("paged_attention", 8, lambda n: 1.0), id="attention without its scale"),
        pytest.param("gemma2", with_argument("paged_attention", 11, lambda n: 0.0), id="no softcap"),
        pytest.param("gemma2", with_argument("rms_norm", 3, lambda n: 0.0), id="norm without its offset"),
        pytest.param("deepseek_v3", with_argument("rope", 3, lambda n: "neox"), id="another style of rotation"),
        pytest.param("mixtral", with_argument("moe", 2, lambda n: n.args[1]), id="experts with other weights"),
        pytest.param("mamba2", with_argument("ssd_scan", 11, lambda n: False), id="steps without softplus"),
        pytest.param("mamba2", with_argument("causal_conv1d", 7, lambda n: ""), id="convolution without its activation"),
    ],
)
def test_refuses_a_spoiled_graph(model_type: str, rewrite: Callable[[Graph], Graph]) -> None:
    verdict = oracle.admit(model_type, rewrite)
    assert not verdict.admitted
    assert "served logits differ" in verdict.reason


def test_refuses_state_that_does_not_survive_the_step() -> None:
    """Whole prompts in one step would hide this; the oracle's steps must not."""

    def forget(graph: Graph) -> Graph:
        scan = next(n for n in graph.fx.nodes if n.target is torch.ops.ingot.ssd_scan.default)
        with graph.fx.inserting_before(scan):
            blank = graph.call(torch.ops.aten.zeros_like.default, scan.args[7])
        scan.replace_input_with(scan.args[7], blank)
        return graph

    assert not oracle.admit("mamba2", forget).admitted


def test_refuses_numbers_that_are_not() -> None:
    verdict = oracle.admit("llama", with_argument("rms_norm", 2, lambda n: float("nan")))
    assert not verdict.admitted
    assert verdict.error == float("inf")


def test_a_trace_error_is_the_reason() -> None:
    config = tiny.config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    verdict = oracle.admit(config)
    assert not verdict.admitted
    assert "rotary" in verdict.reason.lower()


def test_run_judges_each_in_a_process_of_its_own() -> None:
    (verdict,) = oracle.run(["Qwen2ForCausalLM"])
    assert verdict == oracle.Verdict("Qwen2ForCausalLM", "qwen2", True, "", verdict.error)


def test_the_reason_of_a_crash_is_the_exception() -> None:
    assert oracle._last_error("Traceback (most recent call last):\n  File x\nValueError: no such thing\n") == "ValueError: no such thing"
    with pytest.raises(tiny.UnknownModel, match="'lama' is neither"):
        oracle.run(["lama"])


def test_the_record_has_what_must_be_admitted() -> None:
    record = {v.model_type: v for v in oracle.load()}
    assert [v.architecture for v in oracle.load()] == sorted(v.architecture for v in oracle.load())
    assert all(record[m].admitted and not record[m].reason for m in REQUIRED)
    assert all(v.reason for v in record.values() if not v.admitted)
