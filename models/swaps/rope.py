"""Functions that rotate queries and keys (`apply_rotary_pos_emb` and its kin) → `ingot.rope`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch

from ingot.ops.rotary import STYLES

from . import Patch, Swap, close, modeling_files
from .context import Context

COMPLEX = "freqs_cis"
"""What modeling code calls a table of complex numbers cos + i sin."""


class Tables(NamedTuple):
    """Takes the place of a complex table on its way to a function that reads it: cos and sin [1, T, R/2]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def to(self, *args: Any, **kwargs: Any) -> Tables:
        return self


@dataclass(frozen=True)
class _Call:
    """Shapes of one call: the tensors to rotate, the tables, and where the tables' head dim goes."""

    inputs: tuple[tuple[int, ...], ...]
    table: tuple[int, ...]
    head_dim: int


class Rope(Swap):
    """A function qualifies when its signature is (x, …, cos, sin, …) or (x, …, freqs_cis, …), and it returns the x's, rotated."""

    def __init__(self, model: torch.nn.Module, context: Context) -> None:
        self.functions = {(file, name): f for file in modeling_files(model) for name, f in vars(file).items() if _takes_tables(name, f)}
        self.calls: dict[tuple[Any, str], set[_Call]] = {}
        self._inside = False
        self._styles: dict[tuple[Any, str], str] | None = None

    def observers(self) -> list[Patch]:
        return [Patch(file, name, self._observer((file, name), f)) for (file, name), f in self.functions.items()]

    def _observer(self, key: tuple[Any, str], function: Callable[..., Any]) -> Callable[..., Any]:
        def observe(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # a function that a rotation is built from goes with it
                return function(*args, **kwargs)
            inputs, cos, _, head_dim = _arguments(function, args, kwargs)
            self.calls.setdefault(key, set()).add(_Call(tuple(tuple(x.shape) for x in inputs), tuple(cos.shape), head_dim))
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return observe

    @property
    def styles(self) -> dict[tuple[Any, str], str]:
        """Style of each function that matched."""
        if self._styles is None:
            found = {key: _style(self.functions[key], calls) for key, calls in self.calls.items()}
            self._styles = {key: style for key, style in found.items() if style is not None}
        return self._styles

    @property
    def all_matched(self) -> bool:
        """Whether nothing but `ingot.rope` will read the tables."""
        return bool(self.calls) and len(self.styles) == len(self.calls)

    def patches(self) -> list[Patch]:
        return [Patch(*key, _replacement(self.functions[key], style)) for key, style in self.styles.items()]


def _takes_tables(name: str, function: Any) -> bool:
    if not isinstance(function, FunctionType) or "rot" not in name:
        return False
    names = list(inspect.signature(function).parameters)
    if COMPLEX in names:
        return names.index(COMPLEX) in (1, 2)
    return "cos" in names and names.index("cos") in (1, 2) and names[names.index("cos") + 1 :][:1] == ["sin"]


def _arguments(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, int]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    names = list(bound.arguments)
    if COMPLEX in names:
        inputs, table = [bound.arguments[n] for n in names[: names.index(COMPLEX)]], bound.arguments[COMPLEX]
        cos, sin = table if isinstance(table, Tables) else (table.real, table.imag)
        return inputs, cos, sin, 2 if inputs[0].shape[1] == cos.shape[1] else 1
    inputs = [bound.arguments[n] for n in names[: names.index("cos")]]
    return inputs, bound.arguments["cos"], bound.arguments["sin"], bound.arguments.get("unsqueeze_dim", 1)


def _style(function: Callable[..., Any], calls: set[_Call]) -> str | None:
    """The style with which `ingot.rope` equals the function at every call seen, or None."""
    if not all(len(c.table) == 3 and c.table[0] == 1 and c.head_dim in (1, 2) and all(len(x) == 4 for x in c.inputs) for c in calls):
        return None
    parameters = inspect.signature(function).parameters
    accepts, complex_tables = "unsqueeze_dim" in parameters, COMPLEX in parameters
    generator = torch.Generator().manual_seed(0)
    for style in STYLES:
        if complex_tables and not style.endswith("_half"):
            continue
        for call in calls:
            inputs = [torch.randn(shape, generator=generator) for shape in call.inputs]
            cos, sin = (_table(style, call.table, generator) for _ in range(2))
            if cos.shape[-1] * (2 if style.endswith("_half") else 1) > min(x.shape[-1] for x in inputs):
                break
            tables = (torch.complex(cos, sin),) if complex_tables else (cos, sin)
            rotated = function(*inputs, *tables, **({"unsqueeze_dim": call.head_dim} if accepts else {}))
            expected = rotated if isinstance(rotated, tuple) else (rotated,)
            if not all(close(_rotate(x, cos, sin, style, call.head_dim), y) for x, y in zip(inputs, expected, strict=True)):
                break
        else:
            return style
    return None


def _table(style: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A random table that lies as `style` promises: functions may read any of the copies of a frequency."""
    if style.endswith("_half"):
        return torch.randn(shape, generator=generator)
    half = torch.randn((*shape[:-1], shape[-1] // 2), generator=generator)
    return half.repeat_interleave(2, -1) if style == "gptj" else torch.cat([half, half], -1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str, head_dim: int) -> torch.Tensor:
    """x [1, H, T, E] (`head_dim` 1) or [1, T, H, E] (2) through `ingot.rope`, which wants [T, H, E]."""
    heads_first = head_dim == 1
    flat = x.squeeze(0).transpose(0, 1) if heads_first else x.squeeze(0)
    out = torch.ops.ingot.rope(flat, cos.squeeze(0), sin.squeeze(0), style)
    return (out.transpose(0, 1) if heads_first else out).unsqueeze(0)


def _replacement(function: Callable[..., Any], style: str) -> Callable[..., Any]:
    def rope(*args: Any, **kwargs: Any) -> Any:
        inputs, cos, sin, head_dim = _arguments(function, args, kwargs)
        rotated = tuple(_rotate(x, cos, sin, style, head_dim) for x in inputs)
        return rotated if len(rotated) > 1 else rotated[0]

    return rope
