"""Attention: the implementation that transformers calls writes k and v to their pages and attends over them; an encoder's attends over the step."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from . import Patch, Swap
from .context import Context, TraceError, current
from .latent import latent_attention
from .masks import Mask

# Arguments that say nothing about what attention computes: bookkeeping of training, of outputs, or of the cache.
_IGNORED = frozenset(
    "dropout position_ids cache_position use_cache past_key_values past_key_value layer_idx position_embeddings deterministic output_attentions "
    "output_hidden_states output_router_logits return_dict cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k input_ids inputs_embeds "
    "num_items_in_batch logits_to_keep enable_gqa".split()
)


def paged(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, scaling: float | None = None,
          sliding_window: int | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
          is_causal: bool | None = None, alibi_slopes: torch.Tensor | None = None, indices: torch.Tensor | None = None,
          **others: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query [1, H, T, E], key [1, K, T, E], value [1, K, T, F] → [1, T, H, F]. TraceError for an argument that would be dropped."""
    where = type(module).__name__
    for name, given in others.items():
        if given is not None and name not in _IGNORED:
            raise TraceError(f"{where}: attention is given {name}, which paged attention does not know")
    mask = _mask(module, attention_mask, is_causal)
    if sliding_window and mask.window and int(sliding_window) != mask.window:
        raise TraceError(f"{where}: attention is given sliding_window={sliding_window}, its mask has {mask.window}")
    if query.shape[0] != 1:
        raise TraceError(f"{where}: attention over a batch of {query.shape[0]}; a packed step is a batch of one")
    scale, sinks = float(scaling if scaling is not None else query.shape[-1] ** -0.5), s_aux if s_aux is not None else sinks
    if hasattr(module, "expand_kv"):
        if softcap or alibi_slopes is not None:
            raise TraceError(f"{where}: latent attention with a softcap or biases, which ingot.mla_attention does not know")
        return latent_attention(module, query, key, value, mask, scale, indices, sinks), None
    if indices is not None:
        raise TraceError(f"{where}: attention is given indices of keys, which paged attention does not know")
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    context = current()
    scale = float(scaling) if scaling is not None else q.shape[-1] ** -0.5
    if not mask.causal:
        if softcap or s_aux is not None or sinks is not None:
            raise TraceError(f"{where}: attention in both directions with a softcap or sinks, which packed attention does not know")
        if context.observing:
            return q.new_empty(1, q.shape[0], q.shape[1], v.shape[2]), None
        return torch.ops.ingot.packed_attention(q, k, v, context.values["cu_seqlens_q"], scale, mask.window).unsqueeze(0), None
    if context.entry_point == "embed":
        raise TraceError(f"{where}: causal attention in an encoder, whose step has no cache")
    group = f"window{mask.window}" if mask.window else "full"
    caches, static = context.kv_caches(k, v, group), context.kv_scales(module)
    if context.observing:
        return q.new_empty(1, q.shape[0], q.shape[1], v.shape[2]), None
    step = context.values
    states = torch.ops.ingot.kv_write(k, v, *(step[c] for c in caches[:2]), step[f"slot_mapping_{group}"], *(step[c] for c in caches[2:]), *static)
    step.update(zip(caches, states, strict=False))  # without scales, two come back empty
    k_cache, v_cache, *scales = (step[c] for c in caches)
    out = torch.ops.ingot.paged_attention(
        q, k_cache, v_cache, step["cu_seqlens_q"], step["seq_lens"], step[f"page_table_{group}"], sinks, alibi_slopes,
        scale, mask.window, mask.chunk, float(softcap or 0.0), *scales)  # fmt: skip
    return out.unsqueeze(0), None


def _mask(module: torch.nn.Module, attention_mask: Any, is_causal: bool | None) -> Mask:
    if isinstance(attention_mask, Mask):
        return attention_mask
    if attention_mask is not None:
        raise TraceError(f"{type(module).__name__}: attention is given attention_mask as a {type(attention_mask).__name__} that the model made itself")
    if not (getattr(module, "is_causal", False) if is_causal is None else is_causal):
        raise TraceError(f"{type(module).__name__}: attention without attention_mask and not causal: it would see later tokens")
    return Mask()


AttentionInterface.register("ingot", paged)


class Attention(Swap):
    """Every config object of the model names the implementation to call."""

    def __init__(self, model: torch.nn.Module, context: Context) -> None:
        configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation_internal")}
        self.configs = list(configs.values())

    def observers(self) -> list[Patch]:
        return self.patches()

    def patches(self) -> list[Patch]:
        return [Patch(c, "_attn_implementation_internal", "ingot") for c in self.configs]
