"""Normalization modules → `ingot.rms_norm`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from . import Patch, Swap, close
from .context import Context

_EPS = ("variance_epsilon", "eps", "epsilon", "layer_norm_epsilon", "norm_eps", "rms_norm_eps")
_OFFSETS = (0.0, 1.0)


class Norm(Swap):
    """A class is patched; each of its instances takes the op only if one with the same settings was seen to match."""

    def __init__(self, model: torch.nn.Module, context: Context) -> None:
        self.classes = {type(m) for m in model.modules() if "Norm" in type(m).__name__}
        self.calls: dict[tuple[Any, ...], tuple[torch.nn.Module, tuple[int, ...]]] = {}

    def observers(self) -> list[Patch]:
        return [Patch(cls, "forward", self._observer(cls.forward)) for cls in self.classes]

    def _observer(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def observe(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            out = forward(module, *args, **kwargs)
            if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and isinstance(out, torch.Tensor):
                self.calls.setdefault(_settings(module), (module, tuple(args[0].shape)))
            return out

        return observe

    def patches(self) -> list[Patch]:
        offsets = {settings: _offset(*call) for settings, call in self.calls.items()}
        matched = {settings: offset for settings, offset in offsets.items() if offset is not None}
        return [Patch(cls, "forward", _replacement(cls.forward, matched)) for cls in {settings[0] for settings in matched}]


def _settings(module: torch.nn.Module) -> tuple[Any, ...]:
    """What tells the behaviour of one instance of a class from another's."""
    plain = {n: v for n, v in vars(module).items() if isinstance(v, (int, float, str)) and n != "training"}
    tensors = [(n, tuple(t.shape)) for n, t in module.named_parameters()]
    return (type(module), tuple(sorted(plain.items())), tuple(tensors))


def _eps(module: torch.nn.Module) -> float | None:
    values = [v for n in _EPS if isinstance(v := getattr(module, n, None), float)]
    return values[0] if values else None


def _offset(module: torch.nn.Module, shape: tuple[int, ...]) -> float | None:
    """The `offset` with which `ingot.rms_norm` equals the module, or None."""
    eps = _eps(module)
    if eps is None or [n for n, _ in module.named_parameters() if n != "weight"]:
        return None
    real = copy.deepcopy(module).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    for p in real.parameters():
        torch.nn.init.normal_(p, 0.7, 0.5, generator=generator)
    # the small scale tells apart where eps is added
    inputs = [torch.randn(shape, generator=generator) * scale for scale in (1.0, 3e-3)]
    weight = getattr(real, "weight", None)
    for offset in _OFFSETS:
        if all(close(torch.ops.ingot.rms_norm(x, weight, eps, offset), real(x)) for x in inputs):
            return offset
    return None


def _replacement(forward: Callable[..., Any], matched: dict[tuple[Any, ...], float]) -> Callable[..., Any]:
    def rms_norm(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        offset = matched.get(_settings(module))
        if offset is None or len(args) != 1 or kwargs:
            return forward(module, *args, **kwargs)
        return torch.ops.ingot.rms_norm(args[0], getattr(module, "weight", None), _eps(module), offset)

    return rms_norm
