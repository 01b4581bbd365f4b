"""Torch's own matrix libraries (cuBLAS, oneDNN) as claimants: they write into a given output, and are called by name.

They compete with generated kernels like any family, and win where matrices are large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .kernel import CLAIMS, Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
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
    backend = "triton" if target.kind == "cuda" else "tvm"
    for claim in CLAIMS.get(("glu", backend), []):  # type: ignore[call-overload]
        for glu in claim(inner, steps, target)[:1]:
            launches = tuple(replace(launch, operands=tuple(_from_scratch(o) for o in launch.operands)) for launch in glu.launches)
            first = _launch("mm", Operand(scratch=0), _X, _WEIGHT)
            return [Candidate(f"library+{glu.name}", (first, *launches), (gate_up, *glu.scratch), rank=_rank(steps))]
    return []


def _from_scratch(operand: Operand) -> Operand:
    if operand.arg == "gate_up":
        return Operand(scratch=0, view=operand.view)
    return operand if operand.scratch is None else replace(operand, scratch=operand.scratch + 1)
