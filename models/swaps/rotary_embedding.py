"""Modules that make the tables of the rotary embedding → `ingot.rotary_embedding`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from . import Patch, Swap, close
from .context import Context, TraceError
from .rope import Rope

_DEPENDS_ON_LENGTH = ("dynamic", "longrope")


class RotaryEmbedding(Swap):
    """A module called with (x, position_ids[, layer_type]) that returns cos and sin of positions × a frequency buffer.

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
            tables = isinstance(out, tuple) and len(out) == 2 and all(isinstance(t, torch.Tensor) and t.dim() == 3 for t in out)
            if tables and isinstance(position_ids, torch.Tensor) and position_ids.dim() == 2 and not out[0].is_complex():
                self.calls[(module, (*args, *kwargs.values()))] = tuple(x.shape)
            return out

        return observe

    def patches(self) -> list[Patch]:
        found = {key: _formula(key[0], key[1], self.constants.get(key[0], {})) for key in self.calls}
        matched = {key: formula for key, formula in found.items() if formula is not None}
        keep_float32 = self.rope.all_matched
        return [Patch(cls, "forward", _replacement(cls.forward, matched, keep_float32)) for cls in {type(module) for module, _ in matched}]


def _formula(module: torch.nn.Module, extra: tuple[Any, ...], buffers: dict[str, torch.Tensor]) -> tuple[str, float, bool] | None:
    """(name of the frequency buffer, scaling, half) with which `ingot.rotary_embedding` equals the module, or None."""
    real = copy.deepcopy(module)
    for name, value in buffers.items():
        real._buffers[name] = value.clone()
    limit = int(getattr(module, "max_seq_len_cached", None) or 4096)
    # the last positions too: tables that depend on the length of a sequence must not match
    positions = torch.tensor([[0, 1, 2, 5, limit // 3, limit // 2, limit - 1, 2 * limit]], dtype=torch.int32)
    cos, sin = real(torch.zeros(1, positions.shape[1], 1), positions, *extra)
    scaling = float(cos[0, 0, 0])
    for name, frequencies in buffers.items():
        for half in (False, True):
            table = torch.ops.ingot.rotary_embedding(positions[0], frequencies, scaling, half)
            if close(table[0], cos[0]) and close(table[1], sin[0]):
                return name, scaling, half
    return None


def _replacement(forward: Callable[..., Any], matched: dict[Any, tuple[str, float, bool]], keep_float32: bool) -> Callable[..., Any]:
    def rotary_embedding(module: torch.nn.Module, x: torch.Tensor, position_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        formula = matched.get((module, (*args, *kwargs.values())))
        if formula is None:
            return forward(module, x, position_ids, *args, **kwargs)
        name, scaling, half = formula
        tables = torch.ops.ingot.rotary_embedding(position_ids.squeeze(0), getattr(module, name), scaling, half)
        return tuple(t.unsqueeze(0) if keep_float32 else t.unsqueeze(0).to(x.dtype) for t in tables)

    return rotary_embedding
