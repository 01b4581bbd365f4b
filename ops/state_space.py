"""Recurrent states: causal convolution and selective state spaces.

T tokens of S sequences, packed. A state lives in a slot per sequence: `state_slots` [S] int32 (−1: a padding row);
`cu_seqlens_q` and `seq_lens` as in attention. A sequence without cached tokens starts from zeros, so that a slot needs
no clearing between its owners.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .dialect import op


def segments(cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, state_slots: torch.Tensor) -> Iterator[tuple[int, int, int, bool]]:
    """(begin, end, slot, fresh) of every sequence that has new tokens."""
    starts = cu_seqlens_q.tolist()
    for s, (length, slot) in enumerate(zip(seq_lens.tolist(), state_slots.tolist(), strict=True)):
        begin, end = starts[s], starts[s + 1]
        if slot >= 0 and end > begin and length > 0:
            yield begin, end, slot, length == end - begin


@op("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor conv_state, Tensor cu_seqlens_q, Tensor seq_lens, Tensor state_slots, str act) "
    "-> (Tensor, Tensor)", states=("conv_state",), host_sync=True,
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format))  # fmt: skip
def causal_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv_state: torch.Tensor, cu_seqlens_q: torch.Tensor,
                  seq_lens: torch.Tensor, state_slots: torch.Tensor, act: str) -> torch.Tensor:  # fmt: skip
    """Depthwise causal convolution of x [T, C] with weight [C, W], then `act` ("" or "silu") → [T, C]; conv_state [slots, C, W−1]."""
    out = torch.zeros_like(x)
    for begin, end, slot, fresh in segments(cu_seqlens_q, seq_lens, state_slots):
        past = torch.zeros_like(conv_state[slot]) if fresh else conv_state[slot]
        h = torch.cat([past.to(x.dtype), x[begin:end].t()], -1)
        conv_state[slot] = h[:, h.shape[1] - past.shape[1] :].to(conv_state.dtype)
        y = F.conv1d(h[None].to(weight.dtype), weight[:, None], bias, groups=weight.shape[0])[0].t()
        out[begin:end] = (F.silu(y) if act == "silu" else y).to(x.dtype)
    return out


@op("ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor ssm_state, Tensor cu_seqlens_q, Tensor seq_lens, "
    "Tensor state_slots, bool softplus, float dt_min, float dt_max) -> (Tensor, Tensor)",
    fake=lambda x, *rest: torch.empty(x.shape, dtype=torch.float32, device=x.device), states=("ssm_state",), host_sync=True)  # fmt: skip
def ssd_scan(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
             dt_bias: torch.Tensor | None, ssm_state: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
             state_slots: torch.Tensor, softplus: bool, dt_min: float, dt_max: float) -> torch.Tensor:  # fmt: skip
    """Mamba-2's recurrence (Dao & Gu 2024): h ← exp(dt·A) h + dt·x Bᵀ, y = h C + D x, in float32.

    x [T, H, P], dt [T, H], A [H] (negative), B and C [T, G, N] with H a multiple of G, D and dt_bias [H];
    ssm_state [slots, H, P, N] → y [T, H, P] float32.
    """
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = (F.softplus(step) if softplus else step).clamp(dt_min, dt_max)
    decay = torch.exp(step * A.float())
    repeat = x.shape[1] // B.shape[1]
    b, c = B.float().repeat_interleave(repeat, 1), C.float().repeat_interleave(repeat, 1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for begin, end, slot, fresh in segments(cu_seqlens_q, seq_lens, state_slots):
        h = torch.zeros_like(ssm_state[slot], dtype=torch.float32) if fresh else ssm_state[slot].float()
        for t in range(begin, end):
            h = decay[t, :, None, None] * h + (step[t, :, None] * x[t].float())[..., None] * b[t, :, None]
            out[t] = torch.einsum("hpn,hn->hp", h, c[t])
        if D is not None:
            out[begin:end] += D.float()[:, None] * x[begin:end].float()
        ssm_state[slot] = h.to(ssm_state.dtype)
    return out


@op("selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor ssm_state, Tensor cu_seqlens_q, "
    "Tensor seq_lens, Tensor state_slots, bool softplus) -> (Tensor, Tensor)",
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format), states=("ssm_state",), host_sync=True)  # fmt: skip
def selective_scan(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
                   z: torch.Tensor | None, dt_bias: torch.Tensor | None, ssm_state: torch.Tensor, cu_seqlens_q: torch.Tensor,
                   seq_lens: torch.Tensor, state_slots: torch.Tensor, softplus: bool) -> torch.Tensor:  # fmt: skip
    """Mamba's recurrence (Gu & Dao 2023): x, dt, z [T, C], A [C, N], B and C [T, N], D and dt_bias [C], ssm_state [slots, C, N] → [T, C]."""
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = F.softplus(step) if softplus else step
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for begin, end, slot, fresh in segments(cu_seqlens_q, seq_lens, state_slots):
        h = torch.zeros_like(ssm_state[slot], dtype=torch.float32) if fresh else ssm_state[slot].float()
        for t in range(begin, end):
            h = torch.exp(step[t, :, None] * A.float()) * h + (step[t] * x[t].float())[:, None] * B[t].float()
            y[t] = h @ C[t].float()
        if D is not None:
            y[begin:end] += D.float() * x[begin:end].float()
        ssm_state[slot] = h.to(ssm_state.dtype)
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)
