"""A tiny config of every model type that transformers has: same architecture, a few thousand weights.

Sizes are set by the names that configs give them. A model whose sizes depend on one another in a way of its own has a line
in `OWN`.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ingot.ops.errors import IngotError

from . import encoders

# Odd ratios on purpose: query heads are not kv heads, the intermediate size is no power of two, a window is shorter than the test's sequences.
_NAMES_OF_SIZE: dict[int, str] = {
    1: "n_shared_experts num_shared_experts topk_group first_k_dense_replace moe_num_shared_experts moe_topk_group num_mtp_layers num_nextn_predict_layers "
    "num_global_layers mamba_ngroups num_logits_to_keep bos_token_id decoder_start_token_id",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_experts_per_tok num_experts_per_token moe_top_k moe_k top_k moe_topk "
    "num_selected_experts num_key_value_heads num_kv_heads top_k_experts swa_num_key_value_heads n_group num_expert_group moe_num_group num_activated_experts "
    "experts_per_token linear_num_key_heads n_mamba_heads mamba_n_groups n_groups mamba_expand expand depth eos_token_id",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads swa_num_attention_heads "
    "linear_num_value_heads num_attn_heads attn_heads lightning_num_heads cross_num_attention_heads time_step_rank mamba_dt_rank conv_kernel",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts qk_rope_head_dim sliding_window attention_window local_attention "
    "attention_chunk_size swa_window window_size sliding_window_size index_topk linear_num_heads state_size ssm_state_size mamba_d_state mamba_n_heads "
    "mamba_num_heads mamba_chunk_size chunk_size patch_size",
    16: "head_dim kv_channels attention_head_dim qk_nope_head_dim v_head_dim qk_head_dim kv_lora_rank linear_key_head_dim linear_value_head_dim swa_head_dim "
    "swa_v_head_dim linear_head_dim d_kv lightning_head_dim index_head_dim index_n_heads hidden_size_per_layer_input mamba_d_head mamba_head_dim mamba_headdim",
    24: "q_lora_rank o_lora_rank",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size moe_shared_expert_intermediate_size "
    "expert_intermediate_size moe_ffn_hidden_size expert_hidden_size expert_ffn_size shared_expert_ffn_hidden_size moe_latent_size image_size",
    64: "hidden_size d_model n_embd dim embed_dim hidden_dim model_dim dim_model hidden_size_per_layer out_hidden_size vision_output_dim",
    96: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff block_ff_dim intermediate_size_mlp "
    "ffn_intermediate_size dense_intermediate_size",
    128: "vocab_size vocab_size_per_layer_input mamba_d_ssm",
    256: "max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len max_seq_length context_length original_max_position_embeddings",
    0: "pad_token_id",
}  # fmt: skip
_SIZES = {name: size for size, names in _NAMES_OF_SIZE.items() for name in names.split()}
_DROPOUTS = frozenset(
    "attention_dropout hidden_dropout resid_pdrop attn_pdrop embd_pdrop hidden_dropout_prob attention_probs_dropout_prob activation_dropout dropout".split()
)
# A size that is None by default is switched on where that is what released models do.
_KEEP_NONE = frozenset("n_inner sliding_window head_dim num_key_value_heads q_lora_rank attention_chunk_size attention_window kv_channels".split())
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern", "mlp_layer_types")

OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_groups": 1},
    "big_bird": {"attention_type": "original_full"},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {"rope_interleave": True},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "intermediate_size": 96,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "laurel_rank": 16,
        "altup_num_inputs": 2,
    },
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"], "num_layers": 2, "window_size": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2, "n_routed_experts": 8, "zero_expert_num": 4},
    "ministral": {"head_dim": 16, "sliding_window": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": 128},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attention_head_size": 16, "attn_layers": ["local", "lsh"], "feed_forward_size": 96},
    "xlm": {"emb_dim": 64, "n_words": 128, "causal": True},
    "xlstm": {"num_heads": 4, "embedding_dim": 64, "num_blocks": 2},
    "zamba": {
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "num_query_groups": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "xmod": {"default_language": "en_XX"},
}
"""What a model needs beyond `_SIZES`, or sets so that each of its features shows (caps small enough to bend scores)."""


OWN_ENCODER: dict[str, dict[str, Any]] = {
    "esmc": {"num_key_value_heads": 4},
    "squeezebert": {"embedding_size": 64},
    "xmod": {"default_language": "en_XX"},
}
"""The same for encoders."""


class UnknownModel(IngotError):
    """No causal language model of transformers has this name."""


def names() -> list[str]:
    """Model types with a causal language model, one for each class, sorted."""
    by_class = {cls: model_type for model_type, cls in reversed(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())}
    return sorted(by_class.values())


def model_type_of(name: str) -> str:
    """The model type of an architecture or a model type. UnknownModel if it is neither."""
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return name
    for model_type, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if cls == name:
            return model_type
    raise UnknownModel(f"{name!r} is neither a model type nor an architecture of a causal language model in transformers {transformers.__version__}")


def architecture_of(model_type: str) -> str:
    """The class of the causal language model of a model type."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def config(model_type: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """The tiny config of `model_type`, with its architecture named."""
    # a multimodal model type may name a language model with a config of its own
    cls = getattr(transformers, architecture_of(model_type)).config_class or CONFIG_MAPPING[model_type]
    values = _shrink(cls) | OWN.get(model_type, {}) | overrides
    tiny = cls(**values)
    tiny.architectures = [architecture_of(model_type)]
    return tiny


def of(name: str) -> transformers.PreTrainedConfig:
    """The tiny config of a model type, an architecture, or an encoder's base model ("BertModel"). UnknownModel if it is none of them."""
    encoder = encoder_architectures().get(name)
    return config(model_type_of(name)) if encoder is None else encoder_config(encoder)


def encoder_config(model_type: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """The tiny config of an encoder, its base model named as the architecture."""
    cls = CONFIG_MAPPING[model_type]
    tiny = cls(**(_shrink(cls) | {"is_decoder": False} | OWN_ENCODER.get(model_type, {}) | overrides))
    tiny.architectures = None
    tiny.architectures = [encoders.architecture(tiny) or ""]
    return tiny


def encoder_architectures() -> dict[str, str]:
    """Model type by base model of every encoder; models that also decode what they have encoded are none."""
    found = {encoders.architecture(CONFIG_MAPPING[m]()): m for m in sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES)}
    return {name: m for name, m in sorted(found.items(), key=str) if name is not None}


def _shrink(cls: type) -> dict[str, Any]:
    """Arguments for a config class that make it tiny: its own defaults, with the sizes replaced."""
    default = vars(cls())
    values: dict[str, Any] = {}
    for name, value in default.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in _SIZES and (number or (value is None and name not in _KEEP_NONE)):
            values[name] = _SIZES[name]
        elif name in _DROPOUTS and number:
            values[name] = type(value)(0)
    if "kv_lora_rank" in default:  # latent attention: every head has its own keys, and the rotated part is apart
        values |= {n: v for n, v in {"num_key_value_heads": 4, "head_dim": 8, "qk_head_dim": 24}.items() if n in default}
    if default.get("is_decoder") is False and "is_encoder_decoder" in default and not default["is_encoder_decoder"]:
        values["is_decoder"] = True  # an encoder's class serves as a causal model when it is told to
    depth = _depth(default)
    for name in _DEPTH:
        if name in values:
            values[name] = depth
    full_depth = next((default[n] for n in _DEPTH if isinstance(default.get(n), int)), None)
    for name, value in default.items():
        if isinstance(value, (list, tuple)) and full_depth and len(value) == full_depth and name not in values:
            values[name] = _each_kind_once(list(value), depth)
    for name in getattr(cls, "sub_configs", None) or {}:
        if default.get(name) is not None:
            values[name] = _shrink(type(default[name]))
    return values


def _depth(default: dict[str, Any]) -> int:
    """Two layers, or as many as there are kinds of layers, at most four."""
    kinds = [len(set(v)) for n in _KINDS if isinstance(v := default.get(n), (list, tuple)) and len(v) > 2]
    return max([2, *(min(k, 4) for k in kinds)])


def _each_kind_once(layers: list[Any], depth: int) -> list[Any]:
    """`depth` entries, every kind of layer first."""
    kinds = [v for i, v in enumerate(layers) if v not in layers[:i]]
    return [*kinds, *layers][:depth]
