"""Aten ops as sums of simpler ones, for `region.py`: torch's own decompositions, and ours where torch's end in ops of another kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions

aten = torch.ops.aten


def _layer_norm(x: torch.Tensor, shape: list[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> Any:
    if len(shape) != 1:
        return NotImplemented
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    y = centred * scale
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(x.dtype), mean, scale


def _var(x: torch.Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    if dim is None or len(dim) != 1 or dim[0] not in (-1, x.dim() - 1):
        return NotImplemented
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    result = (centred * centred).sum(-1, keepdim=keepdim) / (x.shape[-1] - (1 if correction is None else correction))
    return result.to(x.dtype)


def _vector_norm(x: torch.Tensor, order: float = 2, dim: list[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if order != 2 or dim is None:
        return NotImplemented
    wide = x.float()
    return (wide * wide).sum(dim, keepdim=keepdim).sqrt().to(dtype or x.dtype)


def _pow(x: torch.Tensor, exponent: float) -> Any:
    known: dict[float, Callable[[], torch.Tensor]] = {
        1: lambda: x, 2: lambda: x * x, 3: lambda: x * x * x, 4: lambda: (x * x) * (x * x), 0.5: x.sqrt, -0.5: x.rsqrt, -1: x.reciprocal,
    }  # fmt: skip
    return known[exponent]() if exponent in known else NotImplemented


def _clamp(x: torch.Tensor, low: float | None = None, high: float | None = None) -> torch.Tensor:
    x = x if low is None else torch.where(x < low, low, x)
    return x if high is None else torch.where(x > high, high, x)


def _log1p(x: torch.Tensor) -> torch.Tensor:
    """Near 0, 2 artanh(x / (2 + x)) as a series: compilers see through sums that subtract again what was added."""
    s = x / (x + 2.0)
    q = s * s
    near = 2.0 * s * ((((q / 9.0 + 1.0 / 7.0) * q + 0.2) * q + 1.0 / 3.0) * q + 1.0)
    return torch.where(x.abs() < 0.4, near, (x + 1.0).log())


def _expm1(x: torch.Tensor) -> torch.Tensor:
    """Near 0, Taylor's series."""
    near = x * (((((x / 720.0 + 1.0 / 120.0) * x + 1.0 / 24.0) * x + 1.0 / 6.0) * x + 0.5) * x + 1.0)
    return torch.where(x.abs() < 0.3, near, x.exp() - 1.0)


_TORCH = (
    aten.gelu, aten.softplus, aten.leaky_relu, aten.elu, aten.mish, aten.hardswish, aten.hardsigmoid, aten.hardtanh, aten.log_sigmoid_forward,
    aten._softmax, aten._log_softmax, aten.logsumexp, aten.rsub, aten.addcmul, aten.addcdiv, aten.lerp, aten.masked_fill, aten.threshold,
    aten.clamp_min, aten.clamp_max, aten._fused_rms_norm, aten.glu,
)  # fmt: skip

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **get_decompositions(_TORCH),
    aten.native_layer_norm.default: _layer_norm,
    aten.var.correction: _var,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.pow.Tensor_Scalar: _pow,
    aten.clamp.default: _clamp,
    aten.log1p.default: _log1p,
    aten.expm1.default: _expm1,
    aten.silu.default: lambda x: x * torch.sigmoid(x),
    aten.square.default: lambda x: x * x,
    aten.exp2.default: lambda x: torch.exp(x * 0.6931471805599453),
}
"""The table that `make_fx` takes."""
