"""Matrix products with weights, and the choice of rows that need logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dialect import op
from .norm import rms_norm


@op("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]), rowwise=True)  # fmt: skip
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias [N] → [..., N], accumulated in float32."""
    return F.linear(x, weight, bias)


@op("linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
    fake=lambda x, weight, bias, residual: x.new_empty(*x.shape[:-1], weight.shape[0]), rowwise=True)  # fmt: skip
def linear_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """linear(x, weight, bias) + residual [..., N] → [..., N]."""
    return F.linear(x, weight, bias) + residual


@op("rms_norm_linear(Tensor x, Tensor? norm_weight, Tensor weight, Tensor? bias, float eps, float offset=0.0) -> Tensor",
    fake=lambda x, norm_weight, weight, *rest: x.new_empty(*x.shape[:-1], weight.shape[0]), rowwise=True)  # fmt: skip
def rms_norm_linear(x: torch.Tensor, norm_weight: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float,
                    offset: float = 0.0) -> torch.Tensor:  # fmt: skip
    """linear(rms_norm(x [..., K], norm_weight [K], eps, offset), weight [N, K], bias) → [..., N]."""
    return F.linear(rms_norm(x, norm_weight, eps, offset), weight, bias)


@op("gather_rows(Tensor x, Tensor rows) -> Tensor", fake=lambda x, rows: x.new_empty(rows.shape[0], *x.shape[1:]))
def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [T, ...] at rows [R] (int32) → [R, ...]: only the rows that need logits go on to the LM head."""
    return x.index_select(0, rows.long())
