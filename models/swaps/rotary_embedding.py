"""Modules that make the tables of the rotary embedding → `ingot.rotary_embedding`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import Patch, Swap, close
from .context import Context, TraceError
from .rope import Rope, Tables

_DEPENDS_ON_LENGTH = ("dynamic", "longrope")


class _Formula(NamedTuple):
    buffer: str  # of the frequencies
    scaling: float
    half: bool
    is_complex: bool


class RotaryEmbedding(Swap):
    """A module called with (x, position_ids[, layer_type]) that returns cos and sin of positions × a frequency buffer, or cos + i sin.

    `constants` holds the real buffers by module, since the model itself is on the meta device. Tables stay float32 when
    `ingot.rope` alone reads them; code that was not swapped gets them in the model's dtype, as it would from the module.
    """

    def __init__(self, model: torch.nn.Module, context: Context, constants: dict[torch.nn.Module, dict[str, torch.Tensor]], rope: Rope) -> None:
        self.modules = [m for m in model.modules() if "RotaryEmbedding" in type(m).__name__]
        self.constants = constants
        self.rope = rope
        self.calls: dict[tuple[torch.nn.Module, tuple[Any, ...]], tuple[int, ...]] = {}

    def observers(self) -> list[Patch]:
        for module in self.modules:
            kinds = getattr(module, "rope_type", None)
            for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
                if kind in _DEPENDS_ON_LENGTH:
                    name = type(module).__name__
                    raise TraceError(f"{name}: rope type {kind!r} takes its frequencies by the length of a sequence; a step has many sequences")
        return [Patch(cls, "forward", self._observer(cls.forward)) for cls in {type(m) for m in self.modules}]

    def _observer(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def observe(module: torch.nn.Module, x: torch.Tensor, position_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
            out = forward(module, x, position_ids, *args, **kwargs)
            given = out if isinstance(out, tuple) else (out,)
            tables = all(isinstance(t, torch.Tensor) and t.dim() == 3 and t.is_complex() == (len(given) == 1) for t in given) and len(given) < 3
            if tables and isinstance(position_ids, torch.Tensor) and position_ids.dim() == 2:
                self.calls[(module, (*args, *kwargs.values()))] = tuple(x.shape)
            return out

        return observe

    def patches(self) -> list[Patch]:
        found = {key: _formula(key[0], key[1], self.constants.get(key[0], {})) for key in self.calls}
        matched = {key: formula for key, formula in found.items() if formula is not None and (self.rope.all_matched or not formula.is_complex)}
        keep_float32 = self.rope.all_matched
        return [Patch(cls, "forward", _replacement(cls.forward, matched, keep_float32)) for cls in {type(module) for module, _ in matched}]


def _formula(module: torch.nn.Module, extra: tuple[Any, ...], buffers: dict[str, torch.Tensor]) -> _Formula | None:
    """With what `ingot.rotary_embedding` equals the module, or None."""
    real = copy.deepcopy(module)
    for name, value in buffers.items():
        real._buffers[name] = value.clone()
    limit = int(getattr(module, "max_seq_len_cached", None) or 4096)
    # the last positions too: tables that depend on the length of a sequence must not match
    positions = torch.tensor([[0, 1, 2, 5, limit // 3, limit // 2, limit - 1, 2 * limit]], dtype=torch.int32)
    made = real(torch.zeros(1, positions.shape[1], 1), positions, *extra)
    cos, sin = made if isinstance(made, tuple) else (made.real, made.imag)
    scaling = float(cos[0, 0, 0])
    for name, frequencies in buffers.items():
        for half in (False, True):
            table = torch.ops.ingot.rotary_embedding(positions[0], frequencies, scaling, half)
            if close(table[0], cos[0]) and close(table[1], sin[0]):
                return _Formula(name, scaling, half, not isinstance(made, tuple))
    return None


def _replacement(forward: Callable[..., Any], matched: dict[Any, _Formula], keep_float32: bool) -> Callable[..., Any]:
    def rotary_embedding(module: torch.nn.Module, x: torch.Tensor, position_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        formula = matched.get((module, (*args, *kwargs.values())))
        if formula is None:
            return forward(module, x, position_ids, *args, **kwargs)
        name, scaling, half, is_complex = formula
        tables = torch.ops.ingot.rotary_embedding(position_ids.squeeze(0), getattr(module, name), scaling, half)
        if is_complex:
            return Tables(*(t.unsqueeze(0) for t in tables))
        return tuple(t.unsqueeze(0) if keep_float32 else t.unsqueeze(0).to(x.dtype) for t in tables)

    return rotary_embedding
