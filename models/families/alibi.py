"""Decoders with linear biases (ALiBi, Press et al. 2022), and Falcon, whose rotary kind shares the class."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from ..swaps.attention import paged
from . import adapts


def slopes(heads: int) -> list[float]:
    """The slope of each head: a geometric sequence; what a power of two leaves over is taken from the one twice as long."""
    whole = 2 ** math.floor(math.log2(heads))
    return [2.0 ** (-8 * i / whole) for i in range(1, whole + 1)] + [2.0 ** (-8 * i / (2 * whole)) for i in range(1, 2 * (heads - whole), 2)]


@adapts("bloom.BloomAttention")
def bloom(self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, alibi: Any, attention_mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    q, k, v = self._reshape(self.query_key_value(hidden_states))
    out, _ = paged(self, q, k, v, attention_mask, alibi_slopes=torch.tensor(slopes(self.num_heads)))
    return self.dense(out.flatten(-2)) + residual, None


@adapts("mpt.MptAttention")
def mpt(self: Any, hidden_states: torch.Tensor, position_bias: Any, past_key_values: Any = None, attention_mask: Any = None,
        **kwargs: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Its slopes beyond a power of two are every second one of the next power, odd places first."""
    qkv = self.Wqkv(hidden_states)
    qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv) if self.clip_qkv else qkv
    q, k, v = (x.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for x in qkv.chunk(3, -1))
    whole = 2 ** math.ceil(math.log2(self.n_heads))
    every = [2.0 ** (-8 * i / whole) for i in range(1, whole + 1)]
    own = every if whole == self.n_heads else [*every[1::2], *every[::2]][: self.n_heads]
    out, _ = paged(self, q, k, v, attention_mask, scaling=self.softmax_scale, alibi_slopes=torch.tensor(own))
    return self.out_proj(out.flatten(-2)), None


@adapts("falcon.FalconAttention")
def falcon(self: Any, hidden_states: torch.Tensor, alibi: Any, attention_mask: Any, *others: Any, position_embeddings: Any = None,
           **kwargs: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The new architecture groups query heads with their key and value; the old one has a key for every head, or one for all."""
    fused = self.query_key_value(hidden_states)
    if self.new_decoder_architecture:
        grouped = fused.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        q, k, v = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    else:
        q, k, v = self._split_heads(fused)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = None
    if alibi is None:
        q, k = sys.modules[type(self).__module__].apply_rotary_pos_emb(q, k, *position_embeddings)
    else:
        bias = torch.tensor([s * self.inv_norm_factor for s in slopes(self.num_heads)])
    return self.dense(paged(self, q, k, v, attention_mask, alibi_slopes=bias)[0].flatten(-2)), None
