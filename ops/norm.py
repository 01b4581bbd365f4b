"""Normalization. D hidden, computed in float32 and rounded once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dialect import op


@op("rms_norm(Tensor x, Tensor? weight, float eps, float offset=0.0) -> Tensor",
    fake=lambda x, weight, eps, offset: torch.empty_like(x, memory_format=torch.contiguous_format), rowwise=True)  # fmt: skip
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x [..., D] · rsqrt(mean(x²) + eps) · (weight + offset) → [..., D] (Zhang & Sennrich 2019; Gemma's offset is 1)."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * (weight.float() + offset)
    return h.to(x.dtype)


@op("add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset=0.0) -> (Tensor, Tensor)",
    fake=lambda x, residual, weight, eps, offset: (torch.empty_like(x), torch.empty_like(x)), rowwise=True)  # fmt: skip
def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float,
                 offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(rms_norm(x + residual), x + residual), both [..., D]; the sum is rounded to x's dtype before it is normalized."""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total


@op("rms_norm_gated(Tensor x, Tensor gate, Tensor? weight, float eps, int group, str act, bool norm_first) -> Tensor",
    fake=lambda x, gate, weight, eps, group, act, norm_first: torch.empty_like(x, memory_format=torch.contiguous_format), rowwise=True)  # fmt: skip
def rms_norm_gated(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, eps: float, group: int, act: str,
                   norm_first: bool) -> torch.Tensor:  # fmt: skip
    """RMSNorm over groups of `group` channels (0: all of D) with a gate: norm(x)·act(gate) or norm(x·act(gate)); act silu or sigmoid."""
    g = F.silu(gate.float()) if act == "silu" else torch.sigmoid(gate.float())
    h = x.float() if norm_first else x.float() * g
    shape = h.shape
    h = h.reshape(*shape[:-1], -1, group or shape[-1])
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).reshape(shape)
    if weight is not None:
        h = h * weight.float()
    return (h * g if norm_first else h).to(x.dtype)
