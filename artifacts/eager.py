"""What a plan says in JSON, as Python: argument values, and the functions that torch entries call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ingot.ops import OPS
from ingot.ops.dims import evaluate

from .plan import Arg


def value(arg: Arg, tensor: Callable[[str], torch.Tensor], sizes: Mapping[str, int], device: torch.device) -> Any:
    """The value of an argument in a step of these sizes; `tensor` gives tensors by name."""
    if arg.value is not None:
        return tensor(arg.value).view(getattr(torch, arg.view)) if arg.view else tensor(arg.value)
    if arg.items is not None:
        return [value(i, tensor, sizes, device) for i in arg.items]
    if arg.dim is not None:
        return evaluate(arg.dim, sizes)
    if arg.number:
        return float(arg.number)
    if arg.dtype:
        return getattr(torch, arg.dtype)
    return device if arg.device else arg.const


def constant(value: Any) -> Arg | None:
    """The argument that says a constant; None when there is none (nodes and sizes are the caller's)."""
    if isinstance(value, torch.dtype):
        return Arg(dtype=str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return Arg(device=True)
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return Arg(number=str(value))
    return Arg(const=value) if value is None or isinstance(value, (bool, int, float, str)) else None


def function(target: str) -> Callable[..., Any]:
    """What a torch entry calls: "ingot.moe" is the reference of a dialect op, "aten.mul.Tensor" an overload of torch."""
    namespace, _, name = target.partition(".")
    if namespace == "ingot":
        return OPS[name].reference
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")
