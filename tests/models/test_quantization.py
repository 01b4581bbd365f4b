"""Quantized checkpoints: the weights that they mean, against the formats' own library where there is one and their documented layouts else."""

import json
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from ingot.models.checkpoint import Checkpoint, CheckpointError, recipes
from ingot.models.quantization import QuantizationConfigError, method_of
from ingot.ops.graph import Recipe

_CHECKPOINT = runpy.run_path(str(Path(__file__).parents[1] / "quantized_checkpoint.py"))
words, save_gptq, SIZES = _CHECKPOINT["words"], _CHECKPOINT["save_gptq"], _CHECKPOINT["SIZES"]

Tensors = dict[str, torch.Tensor]
N, K = 40, 256


def weight_of(config: dict[str, Any], tensors: Tensors, folder: Path) -> tuple[torch.Tensor, Recipe]:
    """What the tensors of one module "proj" mean under a quantization config, and how they come to mean it."""
    folder.mkdir(exist_ok=True)
    save_file({f"proj.{n}": t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    method = method_of(LlamaConfig(quantization_config=config))
    assert method is not None
    recipe = method.weight("proj", checkpoint.tensors, checkpoint.meta)
    return recipe.run(checkpoint.tensors, {}), recipe


def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import compressed_tensors.compressors
        import compressed_tensors.quantization
    return compressed_tensors


def scheme(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
BLOCK = {"block_structure": [128, 128]}
DYNAMIC = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}
STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
GROUP = {"strategy": "group", "group_size": 64}
PACKED, INT, FLOAT = "PackedQuantizationCompressor", "IntQuantizationCompressor", "FloatQuantizationCompressor"
COMPRESSED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any] | None, str, str]] = {
    "W4A16 groups of 128": ("pack-quantized", PACKED, INT4 | {"group_size": 128}, None, "int4_group128", "none"),
    "W4A16 groups of 32, zeros": ("pack-quantized", PACKED, INT4 | {"group_size": 32, "symmetric": False}, None, "int4_group32_zero", "none"),
    "W4A16 rows": ("pack-quantized", PACKED, INT4 | {"strategy": "channel"}, None, "int4_channel", "none"),
    "W8A16 packed": ("pack-quantized", PACKED, INT8, None, "int8_channel", "none"),
    "W8A16 packed, zeros": ("pack-quantized", PACKED, INT8 | GROUP | {"symmetric": False}, None, "int8_group64_zero", "none"),
    "W8A8": ("int-quantized", INT, INT8, DYNAMIC | {"type": "int"}, "int8_channel", "int8_token"),
    "W8A8, one scale": ("int-quantized", INT, INT8 | {"strategy": "tensor"}, DYNAMIC | {"type": "int"}, "int8_channel", "int8_token"),
    "FP8": ("float-quantized", FLOAT, FP8, DYNAMIC | {"type": "float"}, "fp8_e4m3_channel", "fp8_e4m3_token"),
    "FP8, one scale": ("float-quantized", FLOAT, FP8 | {"strategy": "tensor"}, STATIC, "fp8_e4m3_channel", "fp8_e4m3_static"),
    "FP8 blocks": ("float-quantized", FLOAT, FP8 | {"strategy": "block"} | BLOCK, None, "fp8_e4m3_block128", "none"),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(N, K), (37, 384), (130, 128)])
@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    layout, compressor, weights, inputs, form, activation = COMPRESSED[name]
    ct = library()
    quantization = ct.quantization.QuantizationScheme(**scheme(weights, inputs))
    n, k = shape
    torch.manual_seed(n)
    weight = torch.randn(n, k)
    groups = {"tensor": (1,), "channel": (n, 1), "group": (n, -(-k // weights.get("group_size", 1))), "block": (-(-n // 128), -(-k // 128))}
    scale = torch.rand(groups[weights["strategy"]]) * 0.01 + (0.3 if weights["num_bits"] == 4 else 0.02)
    given = {"weight": weight, "weight_scale": scale}
    if not weights["symmetric"]:
        half = 1 << (weights["num_bits"] - 1)
        given["weight_zero_point"] = torch.randint(-half, half, scale.shape, dtype=torch.int8)
    compressed = getattr(ct.compressors, compressor).compress(given, quantization)
    expected = getattr(ct.compressors, compressor).decompress(compressed, quantization)["weight"]
    if activation.endswith("static"):
        compressed["input_scale"] = torch.tensor([0.5])
    config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": scheme(weights, inputs)}, "ignore": []}
    actual, recipe = weight_of(config, compressed, tmp_path)
    assert recipe.params[:2] == (form, activation)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act_order", [False, True], ids=["columns", "act order"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 64), (4, -1)])
def test_gptq(bits: int, group: int, symmetric: bool, version: str, act_order: bool, tmp_path: Path) -> None:
    torch.manual_seed(bits + group)
    size = K if group == -1 else group
    codes = torch.randint(0, 1 << bits, (K, N))
    scales = (torch.rand(K // size, N) + 0.5).half()
    zeros = torch.full((K // size, N), 1 << (bits - 1)) if symmetric else torch.randint(1, 1 << bits, (K // size, N))
    g_idx = torch.arange(K) // size
    if act_order:
        g_idx = g_idx[torch.randperm(K)]
    expected = ((codes - zeros[g_idx]) * scales.float()[g_idx]).T
    stored = zeros - 1 if version == "gptq" else zeros
    tensors = {"qweight": words(codes.T, bits).T, "qzeros": words(stored, bits), "scales": scales, "g_idx": g_idx.int()}
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act_order, "checkpoint_format": version}
    actual, recipe = weight_of(config, tensors, tmp_path)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert (recipe.op == "index") == (act_order and group != -1)


@pytest.mark.parametrize("group", [128, 64, 32])
def test_awq(group: int, tmp_path: Path) -> None:
    torch.manual_seed(group)
    codes, zeros = torch.randint(0, 16, (K, N)), torch.randint(0, 16, (K // group, N))
    scales = (torch.rand(K // group, N) + 0.5).half()
    expected = ((codes - zeros.repeat_interleave(group, 0)) * scales.float().repeat_interleave(group, 0)).T
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": words(codes, 4, order), "qzeros": words(zeros, 4, order), "scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    actual, recipe = weight_of(config, tensors, tmp_path)
    assert recipe.params[0] == f"int4_group{group}_zero"
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("keys", "scale_shape", "form", "activation"), [
    ({}, (), "fp8_e4m3_channel", "fp8_e4m3_token"),
    ({"activation_scheme": "static"}, (1,), "fp8_e4m3_channel", "fp8_e4m3_static"),
    ({"weight_block_size": [128, 128]}, (2, 3), "fp8_e4m3_block128", "fp8_e4m3_group128"),
])  # fmt: skip
def test_fp8(keys: dict[str, Any], scale_shape: tuple[int, ...], form: str, activation: str, tmp_path: Path) -> None:
    n, k = 150, 300
    weight, scale = torch.randn(n, k).to(torch.float8_e4m3fn), torch.rand(scale_shape) + 0.5
    blocks = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k] if scale.dim() == 2 else scale
    tensors = {"weight": weight, "weight_scale_inv" if "weight_block_size" in keys else "weight_scale": scale}
    if activation.endswith("static"):
        tensors["input_scale"] = torch.tensor(0.25)
    actual, recipe = weight_of({"quant_method": "fp8"} | keys, tensors, tmp_path)
    assert recipe.params[:2] == (form, activation)
    torch.testing.assert_close(actual, weight.float() * blocks, rtol=0, atol=0)


@pytest.mark.parametrize(("config", "message"), [
    ({"quant_method": "exl3"}, "quant_method 'exl3' is unknown; known are awq, compressed-tensors, fp8, gptq"),
    ({"quant_method": "gptq", "bits": 3}, "quantization_config.bits 3 is not supported; use 4 or 8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 100}, "group_size 100"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ({"quant_method": "gptq", "bits": 4, "rotate": "hadamard"}, "rotate 'hadamard' is not understood"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"bits": 8}}}, "dynamic .* gives modules formats of their own"),
    ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
    ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point False"),
    ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "activation_scheme 'static' does not go with"),
    ({"quant_method": "fp8", "activation_scheme": "per_channel"}, "activation_scheme 'per_channel'"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"g": scheme(INT8)}}, "format 'nvfp4-pack-quantized'"),
    ({"quant_method": "compressed-tensors", "config_groups": {"g": scheme(INT8 | {"num_bits": 3})}}, r"config_groups\.g\.weights\.num_bits 3"),
    ({"quant_method": "compressed-tensors", "config_groups": {"g": scheme(INT4 | {"group_size": 48})}}, r"weights\.group_size 48"),
    ({"quant_method": "compressed-tensors", "config_groups": {"g": scheme(FP8, DYNAMIC | {"strategy": "tensor"})}}, r"input_activations\.strategy 'tensor'"),
])  # fmt: skip
def test_what_is_not_understood_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationConfigError, match=message):
        method_of(LlamaConfig(quantization_config=config))


def read(folder: Path) -> tuple[Checkpoint, dict[str, Recipe], Any]:
    from ingot.models import source

    checkpoint = Checkpoint.open(folder)
    config = source.resolve(str(folder)).config
    reference = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    return checkpoint, recipes(checkpoint, config, {n: (tuple(p.shape), torch.float32) for n, p in reference.named_parameters()}), reference


def test_a_whole_checkpoint_means_a_model(tmp_path: Path) -> None:
    model = save_gptq(tmp_path, alone=("lm_head", "model.layers.1.mlp.down_proj"), modules_to_not_convert=["down_proj"])
    with pytest.raises(QuantizationConfigError, match=r"modules_to_not_convert leaves model\.layers\.0\.mlp\.down_proj alone"):
        read(tmp_path)
    model = save_gptq(tmp_path, alone=("lm_head", "model.layers.1.mlp.down_proj"), modules_to_not_convert=["model.layers.1.mlp.down_proj"])
    checkpoint, found, _ = read(tmp_path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].run(checkpoint.tensors, {}), parameter.data, rtol=0, atol=0)
    assert found["lm_head.weight"].op == "tensor"
    assert found["model.layers.0.self_attn.q_proj.weight"].op == "dequantize"


def test_tensors_that_contradict_the_config(tmp_path: Path) -> None:
    save_gptq(tmp_path, group_size=64)
    with pytest.raises(QuantizationConfigError, match=r"group_size 64 and bits 4 make 96 columns of .*down_proj and 2 groups"):
        read(tmp_path)
    save_gptq(tmp_path, checkpoint_format="gptq_v2")
    with pytest.raises(QuantizationConfigError, match=r"sym True contradicts .*qzeros.*checkpoint_format"):
        read(tmp_path)
    save_gptq(tmp_path, quant_method="fp8")
    with pytest.raises(QuantizationConfigError, match=r"bits 4 is not understood"):
        read(tmp_path)
    save_gptq(tmp_path, desc_act=None)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizationConfigError, match=r"no tensor ends in \.weight_scale"):
        read(tmp_path)


KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def save_with_kv_scales(folder: Path, *, without: str = "") -> None:
    """A Llama in FP8 with calibrated scales of k and v in each layer."""
    tensors = {}
    for name, parameter in AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).named_parameters():
        module = name.removesuffix(".weight")
        tensors[name] = parameter.data.clone()
        if parameter.dim() == 2 and "embed" not in name and module != "lm_head":
            tensors |= {name: parameter.data.to(torch.float8_e4m3fn), f"{module}.weight_scale": torch.ones(len(parameter), 1)}
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.self_attn.{n}_scale": torch.tensor([0.02 + layer]) for n in "kv"}
    tensors.pop(without, None)
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"], "kv_cache_scheme": KV,
                    "config_groups": {"g": scheme(FP8, DYNAMIC | {"type": "float"})}}  # fmt: skip
    config = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"], quantization_config=quantization)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def test_calibrated_scales_of_a_kv_cache(tmp_path: Path) -> None:
    """Weights that the writes to the cache take, when it is of the kind that was calibrated; dropped when it is of another."""
    from ingot.models import source
    from ingot.models.frontend import trace

    save_with_kv_scales(tmp_path)
    checkpoint, config = Checkpoint.open(tmp_path), source.resolve(str(tmp_path)).config
    found = method_of(config)
    assert found is not None
    assert found.kv_cache == "fp8"
    graph = trace(config, dtype=torch.float32, kv_dtype=torch.float8_e4m3fn, kv_calibrated=True)
    writes = [n for n in graph.fx.nodes if getattr(n.target, "__name__", "") == "kv_write.default"]
    assert [[a.name for a in w.args[7:9]] for w in writes] == [[f"model_layers_{i}_self_attn_{n}_scale" for n in "kv"] for i in range(2)]
    parameters = {w.recipe.params[0]: (w.shape, w.dtype) for w in graph.weights.values() if w.recipe.op == "tensor"}
    bound = recipes(checkpoint, config, parameters)
    assert bound["model.layers.1.self_attn.v_scale"].run(checkpoint.tensors, {}).tolist() == pytest.approx([1.02])
    plain = trace(config, dtype=torch.float32)
    assert not [n for n in plain.weights if n.endswith("k_scale")]
    recipes(checkpoint, config, {w.recipe.params[0]: (w.shape, w.dtype) for w in plain.weights.values() if w.recipe.op == "tensor"})
    save_with_kv_scales(tmp_path, without="model.layers.1.self_attn.v_scale")
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.self_attn\.v_scale, which quantization_config\.kv_cache_scheme promises"):
        recipes(Checkpoint.open(tmp_path), config, parameters)


def test_a_kv_cache_scheme_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(QuantizationConfigError, match="kv_cache_scheme"):
        method_of(LlamaConfig(quantization_config={"quant_method": "fp8", "kv_cache_scheme": KV | {"dynamic": True}}))
