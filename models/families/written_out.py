"""Decoders whose attention is matmul, mask, softmax, matmul in their own code: rotary, learned and relative positions are theirs."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from ..swaps.attention import paged
from ..swaps.context import TraceError
from . import adapts


@adapts("gptj.GPTJAttention", "codegen.CodeGenAttention", "gpt_neox_japanese.GPTNeoXJapaneseAttention", method="_attn")
def scaled(self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None) -> tuple[torch.Tensor, None]:
    """query, key, value [1, H, T, E] → [1, H, T, E]."""
    return paged(self, query.to(value.dtype), key.to(value.dtype), value, attention_mask)[0].transpose(1, 2), None


@adapts("gpt_neo.GPTNeoSelfAttention", method="_attn")
def gpt_neo(self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None) -> tuple[torch.Tensor, None]:
    """Scores are not scaled; every other layer has a window that the shared mask does not say."""
    window = self.config.window_size if self.attention_type == "local" else 0
    mask = attention_mask.within(window) if window else attention_mask
    return paged(self, query, key, value, mask, scaling=1.0)[0].transpose(1, 2), None


@adapts("openai.Attention", method="_attn")
def openai_gpt(self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> list[torch.Tensor]:
    """key comes transposed; the causal mask is a buffer of the module."""
    scaling = value.shape[-1] ** -0.5 if self.scale else 1.0
    return [paged(self, query, key.transpose(-1, -2), value, None, scaling=scaling, is_causal=True)[0].transpose(1, 2)]


@adapts("rembert.RemBertSelfAttention", "megatron_bert.MegatronBertSelfAttention", "roformer.RoFormerSelfAttention", "big_bird.BigBirdSelfAttention")
def bert(self: Any, hidden_states: torch.Tensor, attention_mask: Any = None, sinusoidal_pos: Any = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """BERT's decoder; RoFormer's rotates with sines and cosines that it makes once."""
    q, k, v = (p(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2) for p in (self.query, self.key, self.value))
    if sinusoidal_pos is not None:
        q, k, *rotated = self.apply_rotary_position_embeddings(sinusoidal_pos, q, k, *([v] if self.rotary_value else []))
        v = rotated[0] if rotated else v
    return paged(self, q, k, v, attention_mask)[0].flatten(-2), None


@adapts("big_bird.BigBirdModel", method="set_attention_type")
def big_bird(self: Any, value: str) -> None:
    raise TraceError(
        "BigBirdModel: attention_type 'block_sparse' chooses its blocks by the length of a sequence, and does so at random; original_full is supported"
    )


@adapts("xglm.XGLMAttention", "trocr.TrOCRAttention", "mvp.MvpAttention")
def bart(self: Any, hidden_states: torch.Tensor, key_value_states: Any = None, past_key_values: Any = None, attention_mask: Any = None,
         attn_prompt: Any = None, **kwargs: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """BART's decoder before it took the attention interface."""
    if key_value_states is not None or attn_prompt is not None:
        raise TraceError(f"{type(self).__name__}: attention over an encoder or a prompt; a decoder alone has neither")
    q, k, v = (p(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
    return self.out_proj(paged(self, q, k, v, attention_mask, scaling=self.scaling)[0].flatten(-2)), None


@adapts("xglm.XGLMSinusoidalPositionalEmbedding")
def xglm_positions(self: Any, position_ids: torch.Tensor, past_key_values_length: int = 0) -> torch.Tensor:
    """The table is as long as the model's context, and need not grow with a step."""
    return torch.nn.functional.embedding(position_ids + self.offset, self.weights)


@adapts("doge.DogeAttention")
def doge(self: Any, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """A bias for each key, made of its value, is one more dim of the head: [q, 1/scale] · [k, bias]."""
    if self.keep_window_size < self.config.max_position_embeddings:
        raise TraceError(f"DogeAttention: keep_window_size {self.keep_window_size} is less than max_position_embeddings: it would choose keys")
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2), self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
    q, k = sys.modules[type(self).__module__].apply_rotary_pos_emb(q, k, *position_embeddings)
    v = self.v_proj(hidden_states)
    bias = torch.exp(self.A * torch.nn.functional.softplus(self.dt_proj(v))).transpose(1, 2)[..., None].to(k.dtype)
    q = torch.cat([q, torch.full_like(q[..., :1], math.sqrt(self.head_dim))], -1)
    out, _ = paged(self, q, torch.cat([k, bias], -1), v.view(shape).transpose(1, 2), attention_mask, scaling=self.scaling)
    return self.o_proj(out.flatten(-2)), None
