"""From a computation on tensors to a `Recipe`: run it on meta tensors and write down what it did to them.

Transformers' conversion of a checkpoint (`core_model_loading`) is code that moves tensors around. Recorded here, it becomes
data that can be read, stored, composed with the compiler's own recipes and run one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ingot.ops.errors import IngotError
from ingot.ops.graph import Recipe


class RecorderError(IngotError):
    """A conversion computes something that a recipe cannot say."""


class Recorder(TorchDispatchMode):
    """Inside `with torch.inference_mode(), recorder:` every tensor made from `source` tensors has a recipe."""

    def __init__(self) -> None:
        super().__init__()
        self._recipes = WeakIdKeyDictionary()

    def source(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A meta tensor that stands for the checkpoint's tensor `name`."""
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        self._recipes[tensor] = Recipe("tensor", (name,))
        return tensor

    def recipe(self, tensor: torch.Tensor) -> Recipe:
        """How `tensor` was made. RecorderError if not from sources alone."""
        try:
            return self._recipes[tensor]
        except KeyError:
            raise RecorderError("a conversion uses a tensor that is not in the checkpoint") from None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        many = bool(args) and isinstance(args[0], (list, tuple))
        operands = list(args[0]) if many else list(args[:1])
        recipes = [self._recipes.get(t) if isinstance(t, torch.Tensor) else None for t in operands]
        if not recipes or None in recipes:  # an allocation; or a result that is no source's, which `recipe` refuses when it is asked for
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in _RULES:
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
            raise RecorderError(f"a conversion calls {func}, which a recipe cannot say")
        out = func(*args, **(kwargs or {}))
        made = _RULES[name](recipes if many else recipes[0], operands[0].shape, out, *args[1:])
        for tensor, recipe in zip(out, made, strict=True) if isinstance(made, list) else [(out, made)]:
            self._recipes[tensor] = recipe
        return out


def _slices(x: Recipe, shape: torch.Size, dim: int, sizes: list[int]) -> list[Recipe]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [Recipe("slice", (dim % len(shape), e - s, e), (x,)) for s, e in zip(sizes, ends, strict=True)]


def _split(x: Recipe, shape: torch.Size, out: list[torch.Tensor], sizes: Any, dim: int = 0) -> list[Recipe]:
    return _slices(x, shape, dim, [o.shape[dim] for o in out])


def _unbind(x: Recipe, shape: torch.Size, out: list[torch.Tensor], dim: int = 0) -> list[Recipe]:
    return [_reshape(s, shape, o) for s, o in zip(_slices(x, shape, dim, [1] * len(out)), out, strict=True)]


def _select(x: Recipe, shape: torch.Size, out: torch.Tensor, dim: int, index: int) -> Recipe:
    index %= shape[dim]
    return _reshape(Recipe("slice", (dim % len(shape), index, index + 1), (x,)), shape, out)


def _slice(x: Recipe, shape: torch.Size, out: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Recipe:
    if step != 1:
        raise RecorderError("a conversion takes every other element, which a recipe cannot say")
    begin, end, _ = slice(start, end).indices(shape[dim])
    return Recipe("slice", (dim % len(shape), begin, end), (x,))


def _transpose(x: Recipe, shape: torch.Size, out: torch.Tensor, dim0: int = 0, dim1: int = 1) -> Recipe:
    return Recipe("transpose", (dim0 % len(shape), dim1 % len(shape)), (x,))


def _permute(x: Recipe, shape: torch.Size, out: torch.Tensor, dims: list[int]) -> Recipe:
    order = list(range(len(shape)))
    for place, dim in enumerate(d % len(shape) for d in dims):
        other = order.index(dim)
        if other != place:
            x = Recipe("transpose", (place, other), (x,))
            order[place], order[other] = order[other], order[place]
    return x


def _reshape(x: Recipe, shape: torch.Size, out: torch.Tensor, *_: Any) -> Recipe:
    return Recipe("reshape", tuple(out.shape), (x,))


def _same(x: Recipe, *_: Any) -> Recipe:
    return x


_RULES: dict[str, Callable[..., Any]] = dict.fromkeys(("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze"), _reshape)
_RULES |= dict.fromkeys(("clone", "contiguous", "alias", "detach"), _same)
_RULES |= {
    "cat": lambda xs, shape, out, dim=0: Recipe("cat", (dim % len(shape),), tuple(xs)),
    "stack": lambda xs, shape, out, dim=0: Recipe("stack", (dim % out.dim(),), tuple(xs)),
    "split": _split,
    "split_with_sizes": _split,
    "unbind": _unbind,
    "select": _select,
    "slice": _slice,
    "transpose": _transpose,
    "t": _transpose,
    "permute": _permute,
}
