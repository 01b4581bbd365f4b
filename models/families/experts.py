"""Mixtures of experts that do not declare themselves as transformers' experts do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from ..swaps.attention import paged
from ..swaps.context import TraceError
from ..swaps.experts import activation_name
from . import adapts

_ingot = torch.ops.ingot


def gated(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, act: Callable[..., Any]) -> torch.Tensor:
    """Experts of gate | up and down over x [T, D], by ids and weights [T, A]."""
    name = activation_name(act)
    if name is None:
        raise TraceError(f"experts with the activation {type(act).__name__}, which ingot.moe does not know")
    out: torch.Tensor = _ingot.moe(x, ids, weights, w_in, None, w_out, None, name, True, False, False)
    return out


def chosen(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Row n of x [T · A, K] times the matrix that ids [T, A] name for it."""
    out: torch.Tensor = _ingot.grouped_linear(x, weight, None, ids.reshape(-1), transposed)
    return out


def weighted(h: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ over the active experts of h [T · A, D] times weights [T, A] → [T, D]."""
    return (h.unflatten(0, (-1, weights.shape[-1])).float() * weights[..., None].float()).sum(1).to(h.dtype)


@adapts("zaya.ZayaExperts")
def zaya(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    return gated(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, self.act_fn)


@adapts("longcat_flash.LongcatFlashExperts")
def longcat(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Ids from `num_routed_experts` on name experts that return what they are given."""
    identity = top_k_index >= self.num_routed_experts
    kept = (top_k_weights * identity).sum(-1, keepdim=True).to(hidden_states.dtype)
    ids, weights = top_k_index.masked_fill(identity, 0), top_k_weights.masked_fill(identity, 0.0)
    return gated(hidden_states, ids, weights, self.gate_up_proj[: self.num_routed_experts], self.down_proj, self.act_fn) + hidden_states * kept


@adapts("dbrx.DbrxExperts")
def dbrx(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """One matrix [X · I, D] each for gate, up and down."""
    gate, up, down = (w.unflatten(0, (self.num_experts, -1)) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
    x = hidden_states.reshape(-1, self.hidden_size).repeat_interleave(top_k_index.shape[-1], 0)
    h = self.mlp.activation_fn(chosen(x, top_k_index, gate)) * chosen(x, top_k_index, up)
    return weighted(chosen(h, top_k_index, down, transposed=True), top_k_weights).view_as(hidden_states)


def _route(router: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """JetMoE's router: weights and ids [T, A] for x [T, D]."""
    logits, ids = router.layer(x).float().topk(router.top_k, dim=1)
    return torch.softmax(logits, 1).to(x.dtype), ids


@adapts("jetmoe.JetMoeMoE")
def jetmoe(self: Any, layer_input: torch.Tensor) -> torch.Tensor:
    x = layer_input.reshape(-1, self.input_size)
    weights, ids = _route(self.router, x)
    return gated(x, ids, weights, self.input_linear.weight, self.output_linear.weight, self.activation).view_as(layer_input) + self.bias


@adapts("jetmoe.JetMoeAttention")
def jetmoe_attention(self: Any, hidden_states: torch.Tensor, attention_mask: Any = None, position_embeddings: Any = None,
                     **kwargs: Any) -> tuple[torch.Tensor, None, None]:  # fmt: skip
    """The projections of queries and outputs are experts; each active one has a query for every key and value head."""
    moa, heads = self.experts, self.num_key_value_heads
    x = hidden_states.reshape(-1, moa.input_size)
    weights, ids = _route(moa.router, x)
    q = chosen(x.repeat_interleave(moa.top_k, 0), ids, moa.input_linear.weight).view(1, -1, moa.top_k, heads, self.head_dim)
    k, v = (y.unflatten(-1, (heads, self.head_dim)).transpose(1, 2) for y in self.kv_proj(hidden_states).chunk(2, -1))
    q = q.transpose(2, 3).flatten(2, 3).transpose(1, 2)  # the queries of one head stand together
    q, k = sys.modules[type(self).__module__].apply_rotary_pos_emb(q, k, *position_embeddings)
    out = paged(self, q, k, v, attention_mask, scaling=self.scaling)[0].squeeze(0).unflatten(1, (heads, moa.top_k))
    h = chosen(out.transpose(1, 2).reshape(-1, moa.hidden_size), ids, moa.output_linear.weight)
    return weighted(h, weights).view_as(hidden_states) + moa.bias, None, None
