"""Random arguments exist for every call that models make, and are such that references compute on them."""

from __future__ import annotations

import functools

import pytest
import torch

from ingot.compiler.call import call_of
from ingot.models import tiny
from ingot.models.frontend import trace
from ingot.ops import OPS
from ingot.ops.kernel import Call, Steps
from ingot.ops.random_inputs import random_inputs, step_sizes

MODELS = "falcon_mamba gemma3_text gpt_oss hy_v4 jamba minimax mixtral qwen3_next recurrent_gemma rwkv".split()
PREFILL, DECODE = Steps(64, 8, 64, 8, exact=False), Steps(4, 4, 1, 4, exact=True)


@functools.cache
def calls(model_type: str) -> dict[str, Call]:
    graph = trace(tiny.config(model_type), dtype=torch.float32)
    found = [call_of(graph, node) for node in graph.fx.nodes]
    return {str(call): call for call in found if call is not None and call.region is None}


@pytest.mark.parametrize("model_type", MODELS)
def test_references_compute_on_random_inputs(model_type: str) -> None:
    for call in calls(model_type).values():
        for steps in (PREFILL, DECODE):
            inputs = random_inputs(call, steps, step_sizes(steps, 13), "cpu", 0)
            out = OPS[call.op].reference(*inputs.values())
            for result in out if isinstance(out, tuple) else [out]:
                assert result is None or not result.is_floating_point() or bool(result.isfinite().all()), call.op


def test_the_models_make_calls_of_every_state() -> None:
    """A new op with a state belongs to a model above."""
    made = {call.op for m in MODELS for call in calls(m).values()}
    fused = {"qkv_rope_kv_write", "qkv_attention", "latent_rope_write"}  # made by passes
    assert {op.name for op in OPS.values() if op.states} - fused <= made


@pytest.mark.parametrize("topk", [3, 200])
def test_indices_are_of_the_past(topk: int) -> None:
    call = next(c for c in calls("deepseek_v32").values() if c.op == "mla_attention")
    indices = call.args["indices"]
    wide = Call(call.op, {**call.args, "indices": type(indices)(indices.dtype, (indices.shape[0], topk))}, call.results)
    made = random_inputs(wide, PREFILL, step_sizes(PREFILL, 13), "cpu", 0)
    starts, lens = made["cu_seqlens_q"].tolist(), made["seq_lens"].tolist()
    for s, length in enumerate(lens):
        for row, position in zip(range(starts[s], starts[s + 1]), range(length - (starts[s + 1] - starts[s]), length), strict=True):
            chosen = made["indices"][row][made["indices"][row] >= 0].tolist()
            assert len(chosen) == min(topk, position + 1)
            assert len(set(chosen)) == len(chosen)
            assert all(p <= position for p in chosen)
