"""Functions that carry a recurrent state, called by transformers' modules → ops that keep it in a slot of the sequence.

A function qualifies by its name and, on random inputs of the shapes seen, by its result for one sequence that starts now.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import Patch, Swap, close, modeling_files
from .context import Context, TraceError, current
from .state_kernels import DEFAULTS, KERNELS, Arguments, Kernel

_NOT_A_STATE = ("seq_idx", "cu_seqlens")  # arguments of some versions that change the result


class StateSpace(Swap):
    """Module-level functions named in KERNELS."""

    def __init__(self, model: torch.nn.Module, context: Context) -> None:
        self.functions = {(file, name): vars(file)[name] for file in modeling_files(model) for name in KERNELS if name in vars(file)}
        self.calls: dict[tuple[Any, str], Arguments] = {}

    def observers(self) -> list[Patch]:
        return [Patch(file, name, self._observer((file, name), f)) for (file, name), f in self.functions.items()]

    def _observer(self, key: tuple[Any, str], function: Callable[..., Any]) -> Callable[..., Any]:
        kernel = KERNELS[key[1]]

        def observe(*args: Any, **kwargs: Any) -> Any:
            arguments = _bind(function, args, kwargs)
            self.calls.setdefault(key, arguments)
            kind, spec = kernel.state(arguments)
            current().declare(**{kind: spec})
            return function(*args, **kwargs)

        return observe

    def patches(self) -> list[Patch]:
        patches = []
        for key, arguments in self.calls.items():
            function, kernel = self.functions[key], KERNELS[key[1]]
            if not _same(function, kernel, arguments):
                raise TraceError(f"{key[0].__name__}.{key[1]} differs from the op that should keep its state")
            patches.append(Patch(*key, _replacement(function, kernel)))
        return patches


def _bind(function: Callable[..., Any], args: Any, kwargs: Any) -> Arguments:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = {**DEFAULTS, **bound.arguments}
    arguments |= arguments.pop("kwargs", {})
    for name in _NOT_A_STATE:
        if arguments.get(name) is not None:
            raise TraceError(f"{function.__name__} is given {name}, which the op does not know")
    return arguments


def _same(function: Callable[..., Any], kernel: Kernel, seen: Arguments) -> bool:
    """Compare on one sequence of random inputs with the shapes seen."""
    generator = torch.Generator().manual_seed(0)
    names = [n for n in inspect.signature(function).parameters if n in seen]
    arguments = {n: torch.randn(v.shape, generator=generator) if isinstance(v, torch.Tensor) else v for n, v in seen.items()}
    arguments |= {n: -arguments[n].abs() - 0.1 for n in kernel.negative} | {n: arguments[n].sigmoid() for n in kernel.unit}
    out = function(**{n: arguments[n] for n in names})
    _, spec = kernel.state(arguments)
    tokens = kernel.tokens(seen)
    step = tuple(torch.tensor(v, dtype=torch.int32) for v in ([0, tokens], [tokens], [1]))
    actual, _ = kernel.apply(arguments, torch.randn(2, *spec.shape, generator=generator), step)
    return close(actual, out[0] if kernel.pairs else out)


def _replacement(function: Callable[..., Any], kernel: Kernel) -> Callable[..., Any]:
    def keep_state(*args: Any, **kwargs: Any) -> Any:
        arguments = _bind(function, args, kwargs)
        kind, spec = kernel.state(arguments)
        out = current().slot(kind, spec.shape, spec.dtype, lambda state, *step: kernel.apply(arguments, state, step))
        return (out, None) if kernel.pairs else out

    return keep_state
