"""Normalization modules → `ingot.rms_norm`, and those with a gate → `ingot.rms_norm_gated`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import Patch, Swap, close
from .context import Context

_EPS = ("variance_epsilon", "eps", "epsilon", "layer_norm_epsilon", "norm_eps", "rms_norm_eps")


class _Plain(NamedTuple):
    """`ingot.rms_norm` with this eps and offset."""

    eps: float
    offset: float

    def __call__(self, weight: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.ingot.rms_norm(x, weight, self.eps, self.offset)
        return out


class _Gated(NamedTuple):
    """`ingot.rms_norm_gated` with these settings."""

    eps: float
    group: int
    act: str
    norm_first: bool

    def __call__(self, weight: torch.Tensor | None, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.ingot.rms_norm_gated(x, gate, weight, self.eps, self.group, self.act, self.norm_first)
        return out


class Norm(Swap):
    """A class is patched; each of its instances takes the op only if one with the same settings was seen to match."""

    def __init__(self, model: torch.nn.Module, context: Context) -> None:
        self.classes = {type(m) for m in model.modules() if "Norm" in type(m).__name__}
        self.calls: dict[tuple[Any, ...], tuple[torch.nn.Module, list[tuple[int, ...]]]] = {}

    def observers(self) -> list[Patch]:
        return [Patch(cls, "forward", self._observer(cls.forward)) for cls in self.classes]

    def _observer(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def observe(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            out = forward(module, *args, **kwargs)
            tensors = _operands(args, kwargs)
            if tensors is not None and isinstance(out, torch.Tensor):
                self.calls.setdefault((_settings(module), len(tensors)), (module, [tuple(t.shape) for t in tensors]))
            return out

        return observe

    def patches(self) -> list[Patch]:
        found = {key: _match(*call) for key, call in self.calls.items()}
        matched = {key: op for key, op in found.items() if op is not None}
        return [Patch(cls, "forward", _replacement(cls.forward, matched)) for cls in {settings[0] for settings, _ in matched}]


def _operands(args: Any, kwargs: Any) -> list[torch.Tensor] | None:
    """x, or x and gate, if the call has nothing else."""
    operands = [a for a in (*args, *kwargs.values()) if a is not None]
    named = set(kwargs) <= {"gate"}
    return operands if named and len(operands) in (1, 2) and all(isinstance(a, torch.Tensor) for a in operands) else None


def _settings(module: torch.nn.Module) -> tuple[Any, ...]:
    """What tells the behaviour of one instance of a class from another's."""
    plain = {n: v for n, v in vars(module).items() if isinstance(v, (int, float, str)) and n != "training"}
    tensors = [(n, tuple(t.shape)) for n, t in module.named_parameters()]
    return (type(module), tuple(sorted(plain.items())), tuple(tensors))


def _match(module: torch.nn.Module, shapes: list[tuple[int, ...]]) -> _Plain | _Gated | None:
    """The op that equals the module on random weights and inputs, or None."""
    eps = next((v for n in _EPS if isinstance(v := getattr(module, n, None), float)), None)
    if eps is None or [n for n, _ in module.named_parameters() if n != "weight"]:
        return None
    real = copy.deepcopy(module).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    for p in real.parameters():
        torch.nn.init.normal_(p, 0.7, 0.5, generator=generator)
    # the small scale tells apart where eps is added
    trials = [[torch.randn(shape, generator=generator) * scale for shape in shapes] for scale in (1.0, 3e-3)]
    weight = real._parameters.get("weight")
    if weight is not None and weight.shape != shapes[0][-1:]:
        return None
    candidates: list[_Plain | _Gated] = [_Plain(eps, offset) for offset in (0.0, 1.0)]
    if len(shapes) == 2:
        groups = dict.fromkeys((0, int(getattr(module, "group_size", 0) or 0)))
        candidates = [_Gated(eps, g, act, first) for g in groups for act in ("silu", "sigmoid") for first in (True, False)]
    for op in candidates:
        if all(close(op(weight, *trial), real(*trial)) for trial in trials):
            return op
    return None


def _replacement(forward: Callable[..., Any], matched: dict[tuple[Any, ...], Any]) -> Callable[..., Any]:
    def norm(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        operands = _operands(args, kwargs) or []
        op = matched.get((_settings(module), len(operands)))
        return forward(module, *args, **kwargs) if op is None else op(module._parameters.get("weight"), *operands)

    return norm
