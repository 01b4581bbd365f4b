"""A small GPTQ checkpoint, and the model that it means."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from ingot.ops import formats

Tensors = dict[str, torch.Tensor]


def words(codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes [R, C] in int32 [R, C·bits/32], the first in the low bits; bits i hold code order[i] of a word."""
    per_word = 32 // bits
    grouped = codes.long().unflatten(-1, (-1, per_word))
    packed = sum(grouped[..., j] << (bits * i) for i, j in enumerate(order or range(per_word)))
    return (packed & 0xFFFFFFFF).where(packed < 1 << 31, packed - (1 << 32)).to(torch.int32)


def gptq_tensors(weight: torch.Tensor, group: int = 32) -> Tensors:
    """A weight [N, K] rounded to nearest, as GPTQ's own layout has it."""
    parts = formats.get(f"int4_group{group}").quantize(weight)
    zeros = torch.full((weight.shape[1] // group, weight.shape[0]), 7)
    return {
        "qweight": words(parts["weight"].T.contiguous().T, 4).T,
        "qzeros": words(zeros, 4),
        "scales": parts["scale"].T,
        "g_idx": torch.arange(weight.shape[1]).int() // group,
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
             max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip


def save_gptq(folder: Path, alone: tuple[str, ...] = ("lm_head",), **keys: Any) -> Any:
    """A small Llama whose projections are quantized, and the model that it means."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]), dtype=torch.float32).eval()
    tensors = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if parameter.dim() == 2 and "embed" not in name and module not in alone:
            tensors |= {f"{module}.{n}": t.contiguous() for n, t in gptq_tensors(parameter.data).items()}
            parameter.data = formats.get("int4_group32").dequantize(formats.get("int4_group32").quantize(parameter.data))
        else:
            tensors[name] = parameter.data.clone()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads(model.config.to_json_string()) | {"dtype": "float32", "quantization_config": GPTQ | keys}
    (folder / "config.json").write_text(json.dumps(config))
    return model
