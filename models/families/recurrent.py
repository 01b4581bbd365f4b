"""Layers that carry a state from token to token in their own code: lightning attention, RG-LRU, RWKV, compressed convolutional attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..swaps.context import TraceError, current
from . import adapts

_ingot = torch.ops.ingot


def shifted(x: torch.Tensor) -> torch.Tensor:
    """x [1, T, C], each token replaced by the one before it in its sequence, the first by zeros."""
    before = torch.tensor([[1.0, 0.0]], dtype=x.dtype).expand(x.shape[-1], 2)
    out = current().slot("conv_state", (int(x.shape[-1]), 1), x.dtype, lambda state, *step: _ingot.causal_conv1d(x[0], before, None, state, *step, ""))
    return out.unsqueeze(0)


@adapts("minimax.MiniMaxLightningAttention")
def lightning(self: Any, hidden_states: torch.Tensor, *others: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """S ← e^−slope S + v kᵀ, y = S q (Qin et al. 2024): Mamba-2's recurrence with a step of 1."""
    qkv = self.act_fn(self.qkv_proj(hidden_states)).squeeze(0).unflatten(-1, (self.num_attention_heads, 3 * self.head_dim))
    q, k, v = qkv.split(self.head_dim, -1)
    shape = (self.num_attention_heads, self.head_dim, self.head_dim)
    y = current().slot("ssm_state", shape, torch.float32, lambda state, *step: _ingot.ssd_scan(
        v, torch.ones_like(q[..., 0]), -self.slope_rate.flatten(), k, q, None, None, state, *step, False, 0.0, math.inf))  # fmt: skip
    y = self.norm(y.to(hidden_states.dtype).flatten(1).unsqueeze(0))
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * y), None


@adapts("recurrent_gemma.RecurrentGemmaRecurrentBlock")
def recurrent_gemma(self: Any, input_states: torch.Tensor, position_ids: torch.Tensor, *others: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    x, weight = self.linear_x(input_states).squeeze(0), self.conv_1d.weight.squeeze(1)
    shape = (int(x.shape[-1]), self.conv1d_width - 1)
    x = current().slot("conv_state", shape, x.dtype, lambda state, *step: _ingot.causal_conv1d(x, weight, self.conv_1d.bias, state, *step, ""))
    return self.linear_out(self.rg_lru(x.unsqueeze(0), position_ids) * self.act_fn(self.linear_y(input_states))), None


@adapts("recurrent_gemma.RecurrentGemmaRglru")
def rg_lru(self: Any, activations: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Gates are block-diagonal, a block for each head. A sequence is reset where it starts, which is where the op starts from zeros."""
    x = activations.squeeze(0)
    heads = x.unflatten(-1, (self.num_attention_heads, self.block_width))
    gates = ((self.input_gate_weight, self.input_gate_bias), (self.recurrent_gate_weight, self.recurrent_gate_bias))
    gate, recurrent = (torch.sigmoid((_ingot.head_linear(heads, weight.transpose(1, 2)) + bias).flatten(1)) for weight, bias in gates)
    log_decay = -8.0 * recurrent * F.softplus(self.recurrent_param)
    norm = torch.where(position_ids.squeeze(0)[:, None] == 0, 1.0, torch.sqrt(1 - torch.exp(2 * log_decay)))
    x, decay = x * gate * norm.to(x.dtype), torch.exp(log_decay)
    h = current().slot("lru_state", (int(x.shape[-1]),), torch.float32, lambda state, *step: _ingot.linear_recurrence(x, decay, state, *step))
    return h.unsqueeze(0)


@adapts("rwkv.RwkvSelfAttention", method="extract_key_value")
def rwkv(self: Any, hidden: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    before = shifted(hidden)
    k, v, r = (hidden * mix + before * (1 - mix) for mix in (self.time_mix_key, self.time_mix_value, self.time_mix_receptance))
    return torch.sigmoid(self.receptance(r)), self.key(k), self.value(v), None


@adapts("rwkv.RwkvFeedForward")
def rwkv_feed_forward(self: Any, hidden: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, None]:
    before = shifted(hidden)
    k, r = (hidden * mix + before * (1 - mix) for mix in (self.time_mix_key, self.time_mix_receptance))
    return torch.sigmoid(self.receptance(r)) * self.value(torch.relu(self.key(k)).square()), None


@adapts("rwkv.RwkvModel", method="_rescale_layers")
def rwkv_unscaled(self: Any) -> None:
    """Halving activations keeps float16 in range and changes no logit; weights stay those of the checkpoint."""


@adapts("zaya.ZayaCCAProjection")
def zaya(self: Any, hidden_states: torch.Tensor, past_key_values: Any = None, conv_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys pass a depthwise and a grouped convolution, two tokens wide each; half of a value comes from the token before."""
    if (self.depthwise_kernel_size, self.grouped_kernel_size) != (2, 2):
        raise TraceError(f"ZayaCCAProjection: convolutions of {self.depthwise_kernel_size} and {self.grouped_kernel_size} tokens; 2 and 2 are supported")
    tokens, groups = hidden_states.shape[:-1], self.num_key_value_groups
    q, k = self.q_proj(hidden_states), self.k_proj(hidden_states)
    now = torch.cat([q, k], -1)
    before = shifted(now)
    w = self.conv_qk_depthwise.weight.squeeze(1)
    now, before = (x * w[:, 1] + y * w[:, 0] + self.conv_qk_depthwise.bias for x, y in ((now, before), (before, shifted(before))))
    grouped = self.conv_qk_grouped.weight.unflatten(0, (-1, self.head_dim))  # [H + K, E, E, 2]
    mixed = sum(torch.einsum("bthi,hoi->btho", x.unflatten(-1, (-1, self.head_dim)), grouped[..., i]) for i, x in enumerate((before, now)))
    mixed = mixed + self.conv_qk_grouped.bias.view(-1, self.head_dim)
    q, k = q.view(*tokens, -1, self.head_dim), k.view(*tokens, -1, self.head_dim)
    q = (q + k.repeat_interleave(groups, 2)) * 0.5
    v = torch.cat([self.v_proj_current(hidden_states), self.v_proj_delayed(shifted(hidden_states))], -1)
    k = q.unflatten(2, (-1, groups)).mean(3)
    return mixed[:, :, : q.shape[2]] + q, mixed[:, :, q.shape[2] :] + k, v.view(*tokens, -1, self.head_dim)
