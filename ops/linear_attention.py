"""Recurrences with a matrix or vector memory: the delta rule, gated linear recurrences, RWKV's, and the extended LSTM's.

Sequences, slots and fresh starts as in `state_space`. All of them compute in float32 and keep a float32 state.
"""

from __future__ import annotations

import torch

from .dialect import op
from .state_space import segments


@op("gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor delta_state, Tensor cu_seqlens_q, Tensor seq_lens, "
    "Tensor state_slots, float eps) -> (Tensor, Tensor)",
    fake=lambda q, k, v, *rest: torch.empty_like(v, memory_format=torch.contiguous_format), states=("delta_state",), host_sync=True)  # fmt: skip
def gated_delta_rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, delta_state: torch.Tensor,
                     cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, state_slots: torch.Tensor, eps: float) -> torch.Tensor:  # fmt: skip
    """S ← exp(g) S; S ← S + k (β (v − Sᵀ k))ᵀ; y = Sᵀ q / √E, in float32 (Yang et al. 2024; with a decay for each channel, Kimi Team 2025).

    q and k [T, K, E], v [T, H, F] with H a multiple of K, beta [T, H], g (≤ 0) [T, H] or [T, H, E];
    delta_state [slots, H, E, F] → y [T, H, F] in v's dtype. With `eps` > 0, q and k are divided by √(Σ x² + eps) first.
    """
    repeat = v.shape[1] // q.shape[1]
    query, key = (x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + eps) if eps > 0 else x.float() for x in (q, k))
    query, key = query.repeat_interleave(repeat, 1) * q.shape[-1] ** -0.5, key.repeat_interleave(repeat, 1)
    decay = torch.exp(g.float() if g.dim() == 3 else g.float()[..., None])[..., None]
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for begin, end, slot, fresh in segments(cu_seqlens_q, seq_lens, state_slots):
        s = torch.zeros_like(delta_state[slot], dtype=torch.float32) if fresh else delta_state[slot].float()
        for t in range(begin, end):
            s = s * decay[t]
            delta = (v[t].float() - torch.einsum("hef,he->hf", s, key[t])) * beta[t].float()[:, None]
            s = s + key[t][..., None] * delta[:, None]
            out[t] = torch.einsum("hef,he->hf", s, query[t]).to(v.dtype)
        delta_state[slot] = s.to(delta_state.dtype)
    return out


@op("linear_recurrence(Tensor x, Tensor decay, Tensor lru_state, Tensor cu_seqlens_q, Tensor seq_lens, Tensor state_slots) -> (Tensor, Tensor)",
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format), states=("lru_state",), host_sync=True)  # fmt: skip
def linear_recurrence(x: torch.Tensor, decay: torch.Tensor, lru_state: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
                      state_slots: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """h ← decay · h + x, channel by channel (Griffin's RG-LRU after its gates; De et al. 2024): x and decay [T, C], lru_state [slots, C] → h [T, C]."""
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for begin, end, slot, fresh in segments(cu_seqlens_q, seq_lens, state_slots):
        h = torch.zeros_like(lru_state[slot], dtype=torch.float32) if fresh else lru_state[slot].float()
        for t in range(begin, end):
            h = decay[t].float() * h + x[t].float()
            out[t] = h.to(x.dtype)
        lru_state[slot] = h.to(lru_state.dtype)
    return out


@op("wkv(Tensor k, Tensor v, Tensor log_decay, Tensor bonus, Tensor wkv_state, Tensor cu_seqlens_q, Tensor seq_lens, Tensor state_slots) -> (Tensor, Tensor)",
    fake=lambda k, *rest: torch.empty_like(k, memory_format=torch.contiguous_format), states=("wkv_state",), host_sync=True)  # fmt: skip
def wkv(k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, bonus: torch.Tensor, wkv_state: torch.Tensor, cu_seqlens_q: torch.Tensor,
        seq_lens: torch.Tensor, state_slots: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """RWKV-4's weighted mean of values (Peng et al. 2023): y_t = (Σ_{i<t} e^{(t−1−i)·log_decay + k_i} v_i + e^{bonus + k_t} v_t) / the same sum of weights.

    k and v [T, C], log_decay (negative) and bonus [C]; wkv_state [slots, 3, C] holds numerator, denominator and the exponent that both are scaled by.
    """
    out = torch.zeros_like(k, memory_format=torch.contiguous_format)
    w, u = log_decay.float(), bonus.float()
    for begin, end, slot, fresh in segments(cu_seqlens_q, seq_lens, state_slots):
        a, b, top = wkv_state[slot].float()
        if fresh:
            a, b, top = torch.zeros_like(a), torch.zeros_like(b), torch.full_like(top, -1e38)
        for t in range(begin, end):
            key, value = k[t].float(), v[t].float()
            now = torch.maximum(top, key + u)
            old, new = torch.exp(top - now), torch.exp(key + u - now)
            out[t] = ((old * a + new * value) / (old * b + new)).to(k.dtype)
            later = torch.maximum(top + w, key)
            old, new = torch.exp(top + w - later), torch.exp(key - later)
            a, b, top = old * a + new * value, old * b + new, later
        wkv_state[slot] = torch.stack([a, b, top]).to(wkv_state.dtype)
    return out
