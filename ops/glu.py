"""Gated linear units over a merged gate/up projection (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable

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


def swiglu_oai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """GPT-OSS's: both sides limited to 7, a steeper sigmoid, and 1 added to up."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1.0) * gate * torch.sigmoid(1.702 * gate)


def _gate(act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda gate, up: act(gate) * up


GATES = {**{name: _gate(act) for name, act in ACTIVATIONS.items()}, "swiglu_oai": swiglu_oai}
"""What gated experts make of gate and up: act(gate) · up, or a formula of their own."""


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
