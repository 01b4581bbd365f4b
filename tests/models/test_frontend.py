"""The graphs that come out of tracing: what they are made of, what they take, what they name."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from ingot.compiler.passes.clean_views import clean_views
from ingot.models import tiny
from ingot.models.frontend import TraceError, trace
from ingot.ops import Graph, InputSpec, Recipe, StateSpec
from ingot.ops.graph import target_name
from ingot.ops.target import Target

CPU = Target("cpu", "x86-64:", "")
LAYER = {
    "ingot.rms_norm": 2,
    "ingot.linear": 7,
    "aten.reshape": 4,
    "ingot.rope": 2,
    "ingot.kv_write": 1,
    "getitem": 2,
    "ingot.paged_attention": 1,
    "aten.add.Tensor": 2,
    "aten.silu": 1,
    "aten.mul.Tensor": 1,
}
ENDS = {"ingot.embedding": 1, "ingot.rotary_embedding": 1, "getitem": 2, "ingot.gather_rows": 1, "ingot.rms_norm": 1, "ingot.linear": 1}


def histogram(graph: Graph) -> Counter[str]:
    return Counter(target_name(n.target) for n in graph.fx.nodes if n.op == "call_function")


def traced(model_type: str, dtype: torch.dtype = torch.float32, **overrides: object) -> Graph:
    return clean_views(trace(tiny.config(model_type, **overrides), dtype=dtype), CPU)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_layer_is_nothing_but_its_ops(model_type: str) -> None:
    graph = traced(model_type, torch.bfloat16, num_hidden_layers=2)
    head_norms = {"ingot.rms_norm": 4} if model_type == "qwen3" else {}
    assert histogram(graph) == Counter(ENDS) + Counter(LAYER) + Counter(LAYER) + Counter(head_norms)
    graph.verify()


def test_inputs_states_and_names() -> None:
    graph = trace(tiny.config("gemma2"), dtype=torch.bfloat16, kv_dtype=torch.float32, page_size=32)
    i32 = torch.int32
    assert graph.inputs == {
        "input_ids": InputSpec(i32, ("T",)),
        "positions": InputSpec(i32, ("T",)),
        "cu_seqlens_q": InputSpec(i32, ("S+1",)),
        "seq_lens": InputSpec(i32, ("S",)),
        "logits_rows": InputSpec(i32, ("R",)),
        "page_table_window8": InputSpec(i32, ("S", "P_window8")),
        "slot_mapping_window8": InputSpec(i32, ("T",)),
        "page_table_full": InputSpec(i32, ("S", "P_full")),
        "slot_mapping_full": InputSpec(i32, ("T",)),
    }
    window, full = (StateSpec(g, "page", torch.float32, (2, 32, 16)) for g in ("window8", "full"))
    assert graph.states == {"k_cache_0": window, "v_cache_0": window, "k_cache_1": full, "v_cache_1": full}
    nodes = graph.placeholders
    assert list(nodes)[: len(graph.inputs) + 4] == [*graph.inputs, *graph.states]
    assert graph.shape(nodes["cu_seqlens_q"]) == ({"S": 1, "": 1},)
    assert graph.shape(nodes["page_table_full"]) == ({"S": 1}, {"P_full": 1})
    assert graph.shape(nodes["k_cache_0"]) == ({"N_window8": 1}, 2, 32, 16)
    logits, *states = graph.fx.output_node().args[0]
    assert graph.shape(logits) == ({"R": 1}, 128)
    assert len(states) == 4


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "mamba2", "gpt_oss"])
def test_no_batch_dim_is_left(model_type: str) -> None:
    graph = traced(model_type, torch.bfloat16)
    for node in graph.fx.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() > 1 and node.op == "call_function":
            assert value.shape[0] != 1, f"{node.name} of\n{graph}"
    assert not [n for n in graph.fx.nodes if n.target is torch.ops.aten.sym_size.int]


def test_tied_embeddings_are_one_weight_under_the_embeddings_name() -> None:
    tied, untied = (trace(tiny.config("qwen3", tie_word_embeddings=t), dtype=torch.float32) for t in (True, False))
    name = "model_embed_tokens_weight"
    assert tied.weights[name].recipe == Recipe("tensor", ("model.embed_tokens.weight",))
    assert len(tied.placeholders[name].users) == 2
    assert "lm_head_weight" not in tied.weights
    assert untied.weights["lm_head_weight"].recipe == Recipe("tensor", ("lm_head.weight",))


def test_frequencies_are_constants_and_unread_buffers_are_gone() -> None:
    graph = trace(tiny.config("llama"), dtype=torch.bfloat16)
    constants = {n: w for n, w in graph.weights.items() if w.recipe.op == "constant"}
    assert list(constants) == ["model_rotary_emb_inv_freq"]
    assert constants["model_rotary_emb_inv_freq"].dtype == torch.float32
    theta = tiny.config("llama").rope_parameters["rope_theta"]
    expected = 1.0 / theta ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(graph.constants["model.rotary_emb.inv_freq"], expected)


def test_rows_are_gathered_before_the_final_norm_and_softcap() -> None:
    graph = traced("gemma2")
    (gather,) = (n for n in graph.fx.nodes if n.target is torch.ops.ingot.gather_rows.default)
    after = [n for n in graph.fx.nodes if n > gather and n.op == "call_function"]
    assert [target_name(n.target) for n in after] == ["ingot.rms_norm", "ingot.linear", "aten.div.Tensor", "aten.tanh", "aten.mul.Tensor"]
    assert all(graph.shape(n)[0] == {"R": 1} for n in after)


def test_parameters_that_transformers_keeps_in_float32() -> None:
    graph = trace(tiny.config("deepseek_v3"), dtype=torch.bfloat16)
    bias = [w.dtype for n, w in graph.weights.items() if n.endswith("e_score_correction_bias")]
    assert bias
    assert set(bias) == {torch.float32}
    assert graph.weights["model_layers_1_mlp_gate_weight"].dtype == torch.bfloat16


def test_slices_written_into_empty_memory_become_a_cat() -> None:
    kinds = histogram(traced("deepseek_v3"))
    assert not [k for k in kinds if "scatter" in k and k != "aten.scatter.value"], kinds
    assert not [k for k in kinds if "empty" in k], kinds


def test_the_config_is_left_alone() -> None:
    config = tiny.config("llama")
    before = config.to_dict()
    trace(config, dtype=torch.bfloat16)
    assert config.to_dict() == before


def test_a_model_that_is_not_causal() -> None:
    from transformers import BertConfig, ViTConfig

    with pytest.raises(TraceError, match=r"'vit'.*is neither a causal language model nor an encoder"):
        trace(ViTConfig(), dtype=torch.float32)
    config = BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48, vocab_size=99, architectures=["BertLMHeadModel"])
    with pytest.raises(TraceError, match=re.escape("create_bidirectional_mask")):
        trace(config, dtype=torch.float32)


def test_a_branch_on_the_number_of_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, x) if x.shape[1] < 50 else x)
    with pytest.raises(TraceError, match=r"LlamaForCausalLM: the code branches on T < 50; a graph has one path"):
        trace(tiny.config("llama"), dtype=torch.float32)
