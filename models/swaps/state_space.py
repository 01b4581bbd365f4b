"""Functions that carry a recurrent state, called by transformers' modules → ops that keep it in a slot of the sequence.

A function qualifies by its name and, on random inputs of the shapes seen, by its result for one sequence that starts now.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ingot.ops import StateSpec

from . import Patch, Swap, close, modeling_files
from .context import Context, TraceError, current

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Kernel:
    """How one function is said in the dialect. `apply` takes its arguments by name and the step (cu_seqlens_q, seq_lens, state_slots)."""

    state: Callable[[Arguments], tuple[str, StateSpec]]
    apply: Callable[[Arguments, torch.Tensor, tuple[torch.Tensor, ...]], tuple[torch.Tensor, torch.Tensor]]


def _conv_state(a: Arguments) -> tuple[str, StateSpec]:
    x, weight = a["hidden_states"], a["weight"]
    return "conv_state", StateSpec("slot", "slot", x.dtype, (int(x.shape[1]), int(weight.shape[-1]) - 1))


def _conv(a: Arguments, state: torch.Tensor, step: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    x = a["hidden_states"].squeeze(0).transpose(0, 1)
    act = {None: "", "silu": "silu", "swish": "silu"}.get(a["activation"])
    if act is None:
        raise TraceError(f"causal_conv1d_fn with activation {a['activation']!r}; silu or none is what causal_conv1d knows")
    y, state = torch.ops.ingot.causal_conv1d(x, a["weight"], a["bias"], state, *step, act)
    return y.transpose(0, 1).unsqueeze(0), state


def _ssd_state(a: Arguments) -> tuple[str, StateSpec]:
    _, _, heads, dim = a["hidden_states"].shape
    return "ssm_state", StateSpec("slot", "slot", torch.float32, (int(heads), int(dim), int(a["B"].shape[-1])))


def _ssd(a: Arguments, state: torch.Tensor, step: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    if a.get("z") is not None:
        raise TraceError("mamba2_chunk_scan is given z, which ssd_scan does not know")
    x, dt, b, c = (a[n].squeeze(0) for n in ("hidden_states", "dt", "B", "C"))
    low, high = (float(v) for v in a["dt_limit"])
    y, state = torch.ops.ingot.ssd_scan(x, dt, a["A"], b, c, a["D"], a["dt_bias"], state, *step, a["dt_softplus"], low, high)
    return y.unsqueeze(0), state


def _selective_state(a: Arguments) -> tuple[str, StateSpec]:
    channels, size = a["A"].shape
    return "ssm_state", StateSpec("slot", "slot", torch.float32, (int(channels), int(size)))


def _selective(a: Arguments, state: torch.Tensor, step: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    x, dt, b, c, z = (None if a[n] is None else a[n].squeeze(0).transpose(0, 1) for n in ("hidden_states", "dt", "B", "C", "z"))
    y, state = torch.ops.ingot.selective_scan(x, dt, a["A"], b, c, a["D"], z, a["delta_bias"], state, *step, a["delta_softplus"])
    return y.transpose(0, 1).unsqueeze(0), state


KERNELS = {
    "mamba_selective_scan": Kernel(_selective_state, _selective),
    "causal_conv1d_fn": Kernel(_conv_state, _conv),
    "mamba2_chunk_scan": Kernel(_ssd_state, _ssd),
}
_DEFAULTS: Arguments = {
    **{"bias": None, "activation": None, "D": None, "z": None},
    **{"dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, float("inf"))},
    **{"delta_bias": None, "delta_softplus": False},
}
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
    arguments = {**_DEFAULTS, **bound.arguments}
    arguments |= arguments.pop("kwargs", {})
    for name in _NOT_A_STATE:
        if arguments.get(name) is not None:
            raise TraceError(f"{function.__name__} is given {name}, which the op does not know")
    return arguments


def _same(function: Callable[..., Any], kernel: Kernel, seen: Arguments) -> bool:
    """Compare on one sequence of random inputs with the shapes seen; a decay must stay negative, as models make it."""
    generator = torch.Generator().manual_seed(0)
    names = [n for n in inspect.signature(function).parameters if n in seen]
    arguments = {n: torch.randn(v.shape, generator=generator) if isinstance(v, torch.Tensor) else v for n, v in seen.items()}
    if "A" in arguments:
        arguments["A"] = -arguments["A"].abs() - 0.1
    expected = function(**{n: arguments[n] for n in names})
    _, spec = kernel.state(arguments)
    tokens = seen["hidden_states"].shape[1 if seen["hidden_states"].dim() == 4 else -1]
    step = tuple(torch.tensor(v, dtype=torch.int32) for v in ([0, tokens], [tokens], [1]))
    actual, _ = kernel.apply(arguments, torch.randn(2, *spec.shape, generator=generator), step)
    return close(actual, expected)


def _replacement(function: Callable[..., Any], kernel: Kernel) -> Callable[..., Any]:
    def keep_state(*args: Any, **kwargs: Any) -> Any:
        arguments = _bind(function, args, kwargs)
        context = current()
        kind, spec = kernel.state(arguments)
        (name,) = context.declare(**{kind: spec})
        step = tuple(context.values[n] for n in ("cu_seqlens_q", "seq_lens", "state_slots"))
        out, context.values[name] = kernel.apply(arguments, context.values[name], step)
        return out

    return keep_state
