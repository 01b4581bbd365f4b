"""Torch's own matrix libraries (cuBLAS, oneDNN) as claimants: they write into a given output, and are called by name.

They compete with generated kernels like any family, and win where matrices are large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

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
    """out [T, N] = x [T, K] · weight [N, K]ᵀ + addend ([N] or [T, N])."""
    torch.addmm(addend, x, weight.t(), out=out)


@_call
def add(out: torch.Tensor, bias: torch.Tensor) -> None:
    """out [T, N] += bias [N]."""
    out.add_(bias)


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
    return [Candidate("library", tuple(launches), rank=_rank(steps))] if len(call.args["x"].shape) == 2 else []


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
