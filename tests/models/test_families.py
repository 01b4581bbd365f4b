"""Adapters beyond the one tiny config that the record tries: the kinds that share a class, odd numbers of heads, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ingot.ops.triton
from ingot.compiler.build import _groups
from ingot.compiler.call import call_of
from ingot.compiler.pipeline import lower
from ingot.models import oracle, tiny
from ingot.models.families.alibi import slopes
from ingot.models.frontend import TraceError, build, trace
from ingot.ops import OPS
from ingot.ops.graph import target_name
from ingot.ops.kernel import Steps, claimants
from ingot.ops.target import Target

FALCONS = {
    "new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "one key for all": {"new_decoder_architecture": False, "multi_query": True},
    "a key for each": {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4, "bias": True},
    "in sequence": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": False},
    "linear biases": {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4, "alibi": True},
    "linear biases, six heads": {
        "new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 6, "alibi": True, "num_attention_heads": 6, "hidden_size": 96,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FALCONS)
def test_falcon(kind: str) -> None:
    """Against transformers' default attention: its eager one adds linear biases twice."""
    config = tiny.config("falcon", **FALCONS[kind])
    reference = build(config, torch.float32, "cpu")
    reference.config._attn_implementation = "sdpa"
    oracle.randomize(reference)
    graph = trace(config, dtype=torch.float32, page_size=oracle.PAGE_SIZE)
    # transformers rounds its slopes to bfloat16, which those of a power of two survive
    tolerance = 5e-3 if kind.endswith("six heads") else 1e-5
    assert oracle.compare(graph, reference) < tolerance
    heads = {s.shape[0] for s in graph.states.values()}
    assert heads == {2 if kind == "new" else 1 if "multi_query" in FALCONS[kind] and FALCONS[kind]["multi_query"] else config.num_attention_heads}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("bloom", {"n_head": 6, "hidden_size": 96}),
        ("mpt", {"n_heads": 6, "d_model": 96}),
        ("mpt", {"n_heads": 6, "d_model": 96, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}}),
        ("gpt_neo", {"attention_types": [[["local"], 2]], "attention_layers": ["local", "local"], "window_size": 3}),
        ("roformer", {"rotary_value": True}),
        ("jetmoe", {"num_key_value_heads": 3, "num_experts_per_tok": 3, "num_attention_heads": 9}),
        ("longcat_flash", {"zero_expert_num": 0}),
        ("deepseek_v3", {"rope_interleave": False, "q_lora_rank": None}),
        ("minicpm3", {"num_attention_heads": 2, "num_key_value_heads": 2}),
    ],
    ids=str,
)
def test_other_sizes(model_type: str, sizes: dict[str, Any]) -> None:
    verdict = oracle.admit(tiny.config(model_type, **sizes))
    assert verdict.admitted, verdict
    assert (verdict.error or 0.0) < 1e-5


def test_slopes() -> None:
    """Those of the paper: 1/2 … 1/256 of 8 heads; what 12 heads have more is taken from 16."""
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(12) == [*slopes(8), *slopes(16)[:8:2]]


@pytest.mark.parametrize(
    ("model_type", "sizes", "message"),
    [
        ("big_bird", {"attention_type": "block_sparse"}, "original_full is supported"),
        ("doge", {"keep_window_size": 100}, "keep_window_size 100 is less than max_position_embeddings"),
        ("zaya", {"cca_time0": 3}, "2 and 2 are supported"),
    ],
)
def test_what_an_adapter_refuses(model_type: str, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(tiny.config(model_type, **sizes), dtype=torch.float32)


def test_a_range_over_the_tokens_is_their_positions() -> None:
    """BART's decoder takes no position_ids: it counts."""
    graph = trace(tiny.config("bart"), dtype=torch.float32)
    assert not [n for n in graph.fx.nodes if "arange" in target_name(n.target)]
    assert graph.placeholders["positions"].users


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32"])
def test_a_latent_cache_is_one_row_a_token(model_type: str) -> None:
    """Bytes of the manifest: latent and rotated key, once for all heads; with an indexer, its key too."""
    config = tiny.config(model_type)
    graph = trace(config, dtype=torch.bfloat16, page_size=16)
    sites = sum(name.startswith("latent_cache") for name in graph.states)
    row = config.kv_lora_rank + config.qk_rope_head_dim + (config.index_head_dim if model_type == "deepseek_v32" else 0)
    (group,) = _groups(graph)
    assert (group.name, group.kind, group.page_size) == ("latent", "page", 16)
    assert sites == config.num_hidden_layers
    assert group.bytes_per_unit == sites * 16 * row * 2
    assert not [n for n in graph.fx.nodes if "paged_attention" in target_name(n.target)]


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "deepseek_v32"])
def test_a_decode_step_over_latents_never_waits_for_the_host(model_type: str) -> None:
    """Each op whose reference would has a kernel, on a GPU, so that a CUDA graph holds the step."""
    ingot.ops.triton.load()
    target, steps = Target("cuda", "sm_90", ""), Steps(8, 8, 1, 8, exact=True, page_size=64)
    graph, _ = lower(trace(tiny.config(model_type), dtype=torch.bfloat16, page_size=64), target)
    calls = [call for node in graph.fx.nodes if (call := call_of(graph, node)) is not None and call.region is None]
    assert {call.op for call in calls} >= {"mla_attention", "head_linear"}
    assert not [call.op for call in calls if OPS[call.op].host_sync and not claimants(call, steps, target)]


def test_a_latent_cache_is_not_quantized() -> None:
    with pytest.raises(TraceError, match="latent attention has no quantized cache"):
        trace(tiny.config("deepseek_v3"), dtype=torch.bfloat16, kv_dtype=torch.int8)
