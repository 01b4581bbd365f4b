"""Matrix products with quantized weights. The formats are in `formats/`.

A checkpoint or a compile flag says whether activations are rounded too; then the rounding is part of the op's meaning, so that
kernels agree with the reference closely, and what it costs a model is measured as what it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import formats
from .dialect import op
from .glu import glu
from .norm import rms_norm


def int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] → codes in −127 … 127 and scales [..., 1], both float32: 127 is the largest absolute value of the row."""
    largest = x.abs().amax(-1, keepdim=True)
    return (x * torch.where(largest > 0, 127 / largest, 0.0)).round(), largest / 127


def fp8_e4m3(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] → codes (values of float8_e4m3fn) and scales [..., 1], both float32: 448 is the largest absolute value of the row, or
    `scale` is given and what is beyond 448 saturates."""
    if scale is None:
        largest = x.abs().amax(-1, keepdim=True)
        scale = torch.where(largest > 0, largest / 448, 1.0)
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float(), scale


ACTIVATIONS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {"int8": int8, "fp8_e4m3": fp8_e4m3}
"""How rows of x may be rounded: "none", or one of these with what shares a scale: `int8_token`, `int8_group128`, `fp8_e4m3_static` (a given scale)."""


def round_activation(x: torch.Tensor, activation: str, input_scale: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] as `activation` rounds it, dequantized, in float32. A group at the end may be a part."""
    x = x.float()
    if activation == "none":
        return x
    kind, _, shared = activation.rpartition("_")
    if shared == "static":
        assert input_scale is not None
        codes, scale = fp8_e4m3(x, input_scale.float())
        return codes * scale
    k = x.shape[-1]
    group = k if shared == "token" else int(shared.removeprefix("group"))
    codes, scale = ACTIVATIONS[kind](F.pad(x, (0, -k % group)).unflatten(-1, (-1, group)))
    return (codes * scale).flatten(-2)[..., :k]


@op("quantized_linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? input_scale, Tensor? bias, Tensor? residual, str? act, "
    "str format, str layout, str activation, int n, Tensor? norm_weight=None, float? eps=None, float offset=0.0) -> Tensor",
    fake=lambda x, weight, scale, zero, input_scale, bias, residual, act, format, layout, activation, n, *norm: x.new_empty(
        *x.shape[:-1], n // 2 if act else n),
    rowwise=True)  # fmt: skip
def quantized_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, input_scale: torch.Tensor | None,
                     bias: torch.Tensor | None, residual: torch.Tensor | None, act: str | None, format: str, layout: str, activation: str,
                     n: int, norm_weight: torch.Tensor | None = None, eps: float | None = None, offset: float = 0.0) -> torch.Tensor:  # fmt: skip
    """x [..., K], with `eps` normalized by `rms_norm` first, rounded as `activation` says, · W [n, K]ᵀ + bias [n] + residual [..., n]
    → [..., n]; with `act`: glu of that → [..., n/2].

    W is what the packed parts (weight, scale, zero) mean; with `act` its two halves were packed one after the other, so that the
    tiles of a layout do not mix gate and up.
    """
    if eps is not None:
        x = rms_norm(x, norm_weight, eps, offset)
    parts = {name: part for name, part in (("weight", weight), ("scale", scale), ("zero", zero)) if part is not None}
    w = formats.get(format).dequantize(formats.unpacked(parts, format, layout, n, x.shape[-1], 2 if act else 1))
    out = F.linear(round_activation(x, activation, input_scale).to(x.dtype), w.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if residual is not None:
        out = out + residual
    return out if act is None else glu(out, act)


@op("add_rms_norm_quantized_linear(Tensor x, Tensor added, Tensor? norm_weight, Tensor weight, Tensor scale, Tensor? input_scale, Tensor? bias, str? act, "
    "str format, str layout, str activation, int n, float eps, float offset) -> (Tensor, Tensor)",
    fake=lambda x, added, norm_weight, weight, scale, input_scale, bias, act, format, layout, activation, n, *norm: (
        x.new_empty(*x.shape[:-1], n // 2 if act else n), torch.empty_like(x)),
    rowwise=True)  # fmt: skip
def add_rms_norm_quantized_linear(x: torch.Tensor, added: torch.Tensor, norm_weight: torch.Tensor | None, weight: torch.Tensor, scale: torch.Tensor,
                                  input_scale: torch.Tensor | None, bias: torch.Tensor | None, act: str | None, format: str, layout: str, activation: str,
                                  n: int, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(quantized_linear of x + added, normalized, x + added), as `add_rms_norm` has them."""
    total = x + added
    return quantized_linear(total, weight, scale, None, input_scale, bias, None, act, format, layout, activation, n, norm_weight, eps, offset), total


@op("glu_quantized_linear(Tensor x, str gate, Tensor weight, Tensor scale, Tensor? input_scale, Tensor? bias, Tensor? residual, str format, str layout, "
    "str activation, int n) -> Tensor", fake=lambda x, *rest: x.new_empty(*x.shape[:-1], rest[-1]), rowwise=True)  # fmt: skip
def glu_quantized_linear(x: torch.Tensor, gate: str, weight: torch.Tensor, scale: torch.Tensor, input_scale: torch.Tensor | None, bias: torch.Tensor | None,
                         residual: torch.Tensor | None, format: str, layout: str, activation: str, n: int) -> torch.Tensor:  # fmt: skip
    """quantized_linear(glu(x [..., 2K], gate), weight [n, K], …) → [..., n]."""
    return quantized_linear(glu(x, gate), weight, scale, None, input_scale, bias, residual, None, format, layout, activation, n)
