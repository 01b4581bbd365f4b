"""Gated linear units over a merged gate/up projection (Shazeer 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dialect import op
from .norm import rms_norm

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


@op("glu(Tensor gate_up, str act) -> Tensor",
    fake=lambda gate_up, act: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2), rowwise=True)  # fmt: skip
def glu(gate_up: torch.Tensor, act: str) -> torch.Tensor:
    """gate_up [..., 2I] = gate | up → act(gate) · up [..., I], in float32, rounded once."""
    gate, up = gate_up.float().chunk(2, -1)
    return (ACTIVATIONS[act](gate) * up).to(gate_up.dtype)


@op("linear_glu(Tensor x, Tensor weight, str act) -> Tensor",
    fake=lambda x, weight, act: x.new_empty(*x.shape[:-1], weight.shape[0] // 2), rowwise=True)  # fmt: skip
def linear_glu(x: torch.Tensor, weight: torch.Tensor, act: str) -> torch.Tensor:
    """glu(x [..., K] · weightᵀ, act) with weight [2I, K] = gate | up → [..., I]."""
    return glu(F.linear(x, weight), act)


@op("rms_norm_linear_glu(Tensor x, Tensor? norm_weight, Tensor weight, str act, float eps, float offset=0.0) -> Tensor",
    fake=lambda x, norm_weight, weight, *rest: x.new_empty(*x.shape[:-1], weight.shape[0] // 2), rowwise=True)  # fmt: skip
def rms_norm_linear_glu(x: torch.Tensor, norm_weight: torch.Tensor | None, weight: torch.Tensor, act: str, eps: float, offset: float = 0.0) -> torch.Tensor:
    """linear_glu(rms_norm(x [..., K], norm_weight [K], eps, offset), weight [2I, K], act) → [..., I]."""
    return linear_glu(rms_norm(x, norm_weight, eps, offset), weight, act)
