"""Quantized weights through the passes: what is joined, what is kept apart, and that the lowered graph still computes the model."""

import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ingot.compiler.pipeline import MANY_ROWS, lower, lower_further
from ingot.compiler.quantization import Request, choose_as, choose_online, dequantized, expert_formats, layers, quantize_weights, with_activations
from ingot.compiler.weights import bind, final_recipe
from ingot.models import oracle, tiny
from ingot.models.checkpoint import Checkpoint
from ingot.models.frontend import trace
from ingot.models.quantization import method_of
from ingot.ops import Graph, Recipe, formats
from ingot.ops.errors import IngotError
from ingot.ops.graph import op_of
from ingot.ops.target import Target

made_up = runpy.run_path(str(Path(__file__).parents[1] / "quantized_checkpoint.py"))
save_gptq, gptq_tensors = made_up["save_gptq"], made_up["gptq_tensors"]
CPU, CUDA = Target("cpu", "x86-64:avx2+fma", ""), Target("cuda", "sm_90", "")
CONFIG = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
                     max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, architectures=["LlamaForCausalLM"])  # fmt: skip


def formats_of(graph: Graph) -> list[str]:
    """Of each product with a weight, in order: its format, or "float"."""
    found = []
    for node in graph.fx.nodes:
        spec = op_of(node)
        if spec is not None and spec.name == "quantized_linear":
            found.append(node.args[8])
        elif spec is not None and "linear" in spec.name:
            found.append("float")
    return found


def with_values(graph: Graph, tensors: dict[str, torch.Tensor]) -> Graph:
    """The graph with its weights' values kept in it."""
    constants = {n: w.recipe.run(tensors, graph.constants) for n, w in graph.weights.items()}
    return replace(graph, constants=constants, weights={n: replace(w, recipe=Recipe("constant", (n,))) for n, w in graph.weights.items()})


LAYER = 4
"""Products in a layer: QKV, output, gate and up, down."""


@pytest.mark.parametrize(("method", "target", "tied"), [
    ("int4-g32", CPU, False),
    ("int8", CPU, True),
    ("int4-g32", CUDA, True),
    ("fp8", CUDA, False),
], ids=["int4 cpu", "int8 cpu, tied", "int4 cuda, tied", "fp8 cuda"])  # fmt: skip
def test_online(method: str, target: Target, tied: bool) -> None:
    config = LlamaConfig(**CONFIG.to_diff_dict() | {"tie_word_embeddings": tied})
    model = oracle_model(config)
    original = {n: p.detach().clone() for n, p in model.state_dict().items()}
    graph = trace(config, dtype=torch.float32, page_size=oracle.PAGE_SIZE)
    everywhere = formats.online(method, target)[0]
    quantized = quantize_weights(graph, choose_online(Request(method), target))
    names = {source for w in quantized.weights.values() if w.recipe.op == "dequantize" for source in w.recipe.sources}
    for name, parameter in model.named_parameters():  # the model that the graph means
        head = name == "lm_head.weight" or (tied and "embed" in name)
        form = formats.LM_HEAD.get(target.kind) if head else everywhere
        if name in names and form is not None and not (tied and head):
            parameter.data = formats.get(form).dequantize(formats.get(form).quantize(parameter.data))
    plain = replace(quantized, weights={n: replace(w, recipe=without_activation(w.recipe)) for n, w in quantized.weights.items()})
    lowered, _ = lower(plain, target)
    assert formats_of(lowered) == [everywhere] * LAYER * 2 + [formats.LM_HEAD.get(target.kind, "float")]
    if not (tied and target is CPU):  # the head alone is rounded there, which no model of transformers can be
        assert oracle.compare(with_values(lowered, original), model) < 1e-5
    embeddings = [w for w in lowered.weights.values() if w.recipe == Recipe("tensor", ("model.embed_tokens.weight",))]
    assert len(embeddings) == 1


def oracle_model(config: LlamaConfig) -> Any:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    oracle.randomize(model)
    return model


def without_activation(recipe: Recipe) -> Recipe:
    if recipe.op == "dequantize":
        return replace(recipe, params=(recipe.params[0], "none", *recipe.params[2:]))
    return replace(recipe, inputs=tuple(map(without_activation, recipe.inputs)))


def test_what_is_excluded_stays() -> None:
    graph = trace(CONFIG, dtype=torch.float32)
    choose = choose_online(Request("int8", ("lm_head", r"layers\.0\..*down_proj", "k_proj")), CPU)
    lowered, _ = lower(quantize_weights(graph, choose), CPU)
    # K is kept apart from Q and V in both layers, the down projection in the first
    assert sorted(formats_of(lowered)) == sorted(["int8_channel", "float", "int8_channel", "int8_channel"] * 2 + ["float", "int8_channel", "float"])


@pytest.mark.parametrize(("flags", "message"), [
    (("int5", "", "", None, False), "--quantize int5 is unknown: use none, fp8, int8, int4-g32"),
    (("int8-gptq", "", "text", None, False), "--quantize int8-gptq is unknown"),
    (("int8", "(", "", None, False), "not a regular expression"),
    (("none", "lm_head", "", None, False), "give --quantize too"),
    (("int4-g128-gptq", "", "", None, False), "needs --calibrate FILE"),
    (("int4-g128", "", "text", None, False), "rounds to nearest"),
    (("int4-g32-awq", "", "text", None, True), "--dummy-weights"),
    (("int8", "", "", method_of(LlamaConfig(quantization_config={"quant_method": "fp8"})), False), r"quantized already \(fp8\)"),
])  # fmt: skip
def test_flags_that_contradict(flags: Any, message: str) -> None:
    with pytest.raises(IngotError, match=message):
        Request.of(*flags)


def checkpoint_of(folder: Path, act_order: dict[str, torch.Tensor]) -> Any:
    """A GPTQ checkpoint of CONFIG whose columns are in the orders given by name endings, and the model that it means."""
    model = save_gptq(folder, desc_act=True)
    tensors = load_file(folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    for name in [n for n in tensors if n.endswith(".g_idx")]:
        module = name.removesuffix(".g_idx")
        order = next((o for ending, o in act_order.items() if module.endswith(ending)), None)
        if order is not None:
            # column j of the model is column order[j] of what is stored in groups
            parameters[f"{module}.weight"].data = parameters[f"{module}.weight"].data[:, order]
            words = tensors[f"{module}.qweight"]
            codes = torch.stack([words >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)[order]
            packed = sum(codes.long()[i::8] << 4 * i for i in range(8))
            tensors[f"{module}.qweight"] = packed.where(packed < 1 << 31, packed - (1 << 32)).int()
            tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, folder / "model.safetensors")
    return model


@pytest.mark.parametrize("same", [True, False], ids=["one order", "two orders"])
def test_act_order(same: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, second, wide = torch.randperm(64), torch.randperm(64), torch.randperm(96)
    orders = {"q_proj": first, "k_proj": first, "v_proj": first if same else second, "down_proj": wide}
    model = checkpoint_of(tmp_path, orders)
    config = AutoConfig.from_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    graph = trace(config, dtype=torch.float32, page_size=oracle.PAGE_SIZE)
    graph.weights = bind(graph, checkpoint, config)
    lowered, _ = lower(graph, CPU)
    products = LAYER + (0 if same else 1)  # V is kept apart from Q and K
    assert formats_of(lowered) == ["int4_group32"] * products * 2 + ["float"]
    assert oracle.compare(with_values(lowered, dict(checkpoint.tensors)), model) < 1e-5


def test_activations_are_rounded_where_kernels_want_it(tmp_path: Path) -> None:
    graph = trace(CONFIG, dtype=torch.float32)
    choose = choose_as(method_of(LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})))
    quantized = quantize_weights(graph, choose)
    for target, activation in ((CPU, "int8_group32"), (CUDA, "none")):
        weights = {n: replace(w, recipe=with_activations(w.recipe, target)) for n, w in quantized.weights.items()}
        lowered, _ = lower(replace(quantized, weights=weights), target)
        assert {n.args[10] for n in lowered.fx.nodes if op_of(n) is not None and op_of(n).name == "quantized_linear"} == {activation}


def test_dummy_weights_of_a_quantized_model_are_seeds() -> None:
    config = LlamaConfig(**CONFIG.to_diff_dict() | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}})
    graph = trace(config, dtype=torch.bfloat16)
    graph = quantize_weights(graph, choose_as(method_of(config)))
    lowered, _ = lower(graph, CUDA)
    assert formats_of(lowered) == ["fp8_e4m3_channel"] * 4 * 2 + ["float"]
    packed = {n: w for n, w in lowered.weights.items() if w.recipe.op == "pack"}
    assert len(packed) == 2 * LAYER * 2
    assert {final_recipe(n, w, None).op for n, w in packed.items()} == {"seed"}
    wide = lower_further(lowered, CUDA, MANY_ROWS)  # the same weights, for the same artifact
    assert wide.weights == lowered.weights
    assert sum(spec.name == "glu_quantized_linear" for n in wide.fx.nodes if (spec := op_of(n)) is not None) == 2
    assert lower_further(wide, CUDA, MANY_ROWS) is wide


def test_experts_of_a_checkpoint_keep_their_codes(tmp_path: Path) -> None:
    """Blocks of 128 × 128, as DeepSeek-V3 and Qwen3 publish them: gate and up of an expert lie together, experts one after another."""
    AutoModelForCausalLM.from_config(tiny.config("qwen3_moe", hidden_size=256, moe_intermediate_size=128), dtype=torch.float32).save_pretrained(tmp_path)
    tensors, form = load_file(tmp_path / "model.safetensors"), formats.get("fp8_e4m3_block128")
    for name in [n for n in tensors if ".experts." in n]:
        parts = form.quantize(tensors[name])
        tensors |= {name: parts["weight"], f"{name}_scale_inv": parts["scale"]}
    save_file(tensors, tmp_path / "model.safetensors")
    keys = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["self_attn", "lm_head", "gate"]}
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = keys
    graph = trace(config, dtype=torch.bfloat16, page_size=64)
    graph.weights = bind(graph, Checkpoint.open(tmp_path), config)
    lowered, _ = lower(graph, CUDA)
    assert dequantized(lowered) == {}
    first = next(n for n in lowered.fx.nodes if (spec := op_of(n)) is not None and spec.name == "quantized_moe")
    assert first.args[13] == "fp8_e4m3_block128"
    for index, names in ((3, ("gate_proj", "up_proj")), (7, ("down_proj",))):
        for node, suffix in zip(first.args[index : index + 2], ("", "_scale_inv"), strict=True):
            packed = lowered.weights[node.name].recipe.run(tensors, {})
            wanted = [torch.cat([tensors[f"model.layers.0.mlp.experts.{e}.{n}.weight{suffix}"] for n in names]) for e in range(len(packed))]
            assert torch.equal(packed.float(), torch.stack(wanted).float())
    assert "ingot.quantized_moe" not in str(lower(graph, CPU)[0])


def gptq_experts(folder: Path, **keys: Any) -> tuple[Checkpoint, Any, Any]:
    """A small mixture whose experts are quantized, its config, and the model that it means."""
    torch.manual_seed(0)
    made = tiny.config("qwen3_moe", hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(made, dtype=torch.float32).save_pretrained(folder)
    tensors, form = load_file(folder / "model.safetensors"), formats.get("int4_group32")
    meant = dict(tensors)
    for name in [n for n in tensors if ".experts." in n]:
        weight, module = tensors.pop(name), name.removesuffix(".weight")
        parts = gptq_tensors(weight)
        if keys.get("desc_act"):
            parts["g_idx"] = parts["g_idx"].flip(0)
        tensors |= {f"{module}.{n}": t.contiguous() for n, t in parts.items()}
        meant[name] = form.dequantize(form.quantize(weight))
    save_file(meant, folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    save_file(tensors, folder / "model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["self_attn", "lm_head", "gate"], **keys}
    return Checkpoint.open(folder), config, model


def test_experts_in_4_bits_compute_the_model(tmp_path: Path) -> None:
    checkpoint, config, model = gptq_experts(tmp_path)
    graph = trace(config, dtype=torch.float32, page_size=oracle.PAGE_SIZE)
    graph.weights = bind(graph, checkpoint, config)
    for target, layout in ((CUDA, "fragments"), (CPU, "tile16")):
        lowered, _ = lower(graph, target)
        assert dequantized(lowered) == {}
        [mixture] = [n for n in lowered.fx.nodes if (spec := op_of(n)) is not None and spec.name == "quantized_moe"]
        assert mixture.args[14:16] == (layout, formats.get("int4_group32").activation(target))
        mixture.update_arg(15, "none")  # the model rounds no rows
        assert oracle.compare(with_values(lowered, dict(checkpoint.tensors)), model) < 1e-5
        ours = [layer for layer in layers(lowered) if layer["node"] == mixture.name]
        assert [layer["format"] for layer in ours] == ["int4_group32"] * 2
        read = [lowered.weights[n.name] for n in mixture.all_input_nodes if n.name in lowered.weights]
        assert sum(layer["bytes"] for layer in ours) == sum(math.prod(w.shape) * w.dtype.itemsize for w in read)


def test_experts_in_act_order_are_floats_and_it_is_said_why(tmp_path: Path) -> None:
    checkpoint, config, _ = gptq_experts(tmp_path, desc_act=True)
    graph = trace(config, dtype=torch.float32)
    graph.weights = bind(graph, checkpoint, config)
    lowered, _ = lower(graph, CUDA)
    assert "the columns of experts are in act order (desc_act)" in dequantized(lowered).values()


def test_experts_are_quantized_where_kernels_read_them() -> None:
    config = tiny.config("mixtral")
    for target, op in ((CUDA, "quantized_moe"), (CPU, "moe"), (Target("cuda", "sm_80", ""), "moe")):
        choose = choose_online(Request("fp8"), target)
        lowered, _ = lower(quantize_weights(trace(config, dtype=torch.bfloat16), choose, expert_formats(target)), target)
        assert {spec.name for n in lowered.fx.nodes if (spec := op_of(n)) is not None and "moe" in spec.name} == {op}
        assert not any("experts" in n for n in dequantized(lowered))
