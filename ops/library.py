"""Torch's own libraries (cuBLAS, oneDNN, attention on a CPU) as claimants: they write into a given output, and are called by name.

They compete with generated kernels like any family, and win where matrices are large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from .chain import chain
from .kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claimants, claims
from .target import Target

CALLS: dict[str, Callable[..., None]] = {}
"""Library calls by the name that plans use, output first."""


def _call(fn: Callable[..., None]) -> Callable[..., None]:
    CALLS[fn.__name__] = fn
    return fn


@_call
def mm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """out [T, N] = x [T, K] · weight [N, K]ᵀ."""
    torch.mm(x, weight.t(), out=out)


@_call
def addmm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor) -> None:
    """out [T, N] = x [T, K] · weight [N, K]ᵀ + addend ([N] or [T, N]), which is copied to out first, unless it lies there already."""
    torch.addmm(addend, x, weight.t(), out=out)


@_call
def add(out: torch.Tensor, bias: torch.Tensor) -> None:
    """out [T, N] += bias ([N] or [T, N])."""
    out.add_(bias)


@_call
def packed_attention(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, scale: float, window: int) -> None:
    """The op of this name on a CPU, one sequence after the other: torch's blocked attention, whose products are the BLAS library's."""
    starts = cu_seqlens_q.tolist()
    for begin, end in pairwise(starts):
        heads = [t[begin:end].transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
        mask = None
        if 0 < window < end - begin:
            positions = torch.arange(end - begin)
            mask = (positions[:, None] - positions).abs() < window
        if begin < end:
            y = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            out[begin:end] = y.squeeze(0).transpose(0, 1)
    out[starts[-1] :] = 0


@_call
def scaled_mm(out: torch.Tensor, x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """out [T, N] = (x [T, K] · weight [N, K]ᵀ) of float8, times x_scale [T, 1] and scale [N]."""
    torch._scaled_mm(x, weight.t(), x_scale, scale.view(1, -1), out_dtype=out.dtype, use_fast_accum=True, out=out)


def multiplies_codes(format: str, activation: str, dtype: torch.dtype, n: int, k: int) -> bool:
    """Whether `scaled_mm` computes a quantized product: of float8 with a scale for each row of both sides."""
    rounded = activation in ("fp8_e4m3_token", "fp8_e4m3_static")
    return rounded and format == "fp8_e4m3_channel" and dtype == torch.bfloat16 and n % 16 == 0 and k % 16 == 0


def _launch(name: str, *operands: Operand) -> Launch:
    return Launch(Source("library", "torch", name, ""), operands)


def _rank(steps: Steps) -> float:
    """Streaming a weight once for a few rows is what generated kernels do better."""
    return 10.0 if steps.max_tokens <= 16 else 0.0


_X, _WEIGHT, _BIAS, _OUT = Operand(arg="x"), Operand(arg="weight"), Operand(arg="bias"), Operand(out=0)


@claims("linear", "torch")
def linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    launch = _launch("mm", _OUT, _X, _WEIGHT) if call.args["bias"] is None else _launch("addmm", _OUT, _X, _WEIGHT, _BIAS)
    return [Candidate("library", (launch,), rank=_rank(steps))] if len(call.args["x"].shape) == 2 else []


@claims("linear_add", "torch")
def linear_add(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    launches = [_launch("addmm", _OUT, _X, _WEIGHT, Operand(arg="residual"))]
    if call.args["bias"] is not None:
        launches.append(_launch("add", _OUT, _BIAS))
    return [Candidate("library", tuple(launches), rank=_rank(steps), inplace="residual")] if len(call.args["x"].shape) == 2 else []


@claims("linear_glu", "torch")
def linear_glu(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """The product goes to scratch; the first generated `glu` kernel of the target reads it from there."""
    x, weight = call.args["x"], call.args["weight"]
    if len(x.shape) != 2:
        return []
    gate_up = Tensor(x.dtype, (x.shape[0], weight.shape[0]))
    inner = Call("glu", {"gate_up": gate_up, "act": call.args["act"]}, call.results)
    product = Candidate("library", (_launch("mm", _OUT, _X, _WEIGHT),))
    return [replace(chain(product, gate_up, "gate_up", glu), rank=_rank(steps)) for glu in claimants(inner, steps, target)[:1]]


@claims("packed_attention", "torch")
def packed_attention_claim(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """On a CPU this is the only claimant. A sequence attends to itself alone, so each is a dense problem of matrix products over
    n × n scores, which is what a BLAS does best (n is tens to thousands, never 1); a generated kernel earns its place where
    pages are gathered or one row is computed, and neither happens here. A GPU would wait for the host to read `cu_seqlens_q`.
    """
    if target.kind != "cpu":
        return []
    operands = (_OUT, *(Operand(arg=n) for n in ("q", "k", "v", "cu_seqlens_q")), Operand(const=call.args["scale"]), Operand(const=call.args["window"]))
    return [Candidate("library", (_launch("packed_attention", *operands),))]
