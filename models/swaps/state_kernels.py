"""How transformers' functions that carry a recurrent state are said in the dialect, one entry for each name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ingot.ops import StateSpec

from .context import TraceError

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Kernel:
    """How one function is said in the dialect. `apply` takes its arguments by name and the step (cu_seqlens_q, seq_lens, state_slots).

    `tokens` counts those of a call. A model makes `negative` arguments so, and those of `unit` between 0 and 1; `pairs` says
    that the function returns its state beside the result.
    """

    state: Callable[[Arguments], tuple[str, StateSpec]]
    apply: Callable[[Arguments, torch.Tensor, tuple[torch.Tensor, ...]], tuple[torch.Tensor, torch.Tensor]]
    tokens: Callable[[Arguments], int]
    negative: tuple[str, ...] = ()
    unit: tuple[str, ...] = ()
    pairs: bool = False


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


def _delta_state(a: Arguments) -> tuple[str, StateSpec]:
    _, _, heads, dim = a["value"].shape
    return "delta_state", StateSpec("slot", "slot", torch.float32, (int(heads), int(a["key"].shape[-1]), int(dim)))


def _delta(a: Arguments, state: torch.Tensor, step: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    if a.get("initial_state") is not None or a.get("output_final_state"):
        raise TraceError("the gated delta rule is given a state of transformers' cache; a traced step has none")
    q, k, v, g, beta = (a[n].squeeze(0) for n in ("query", "key", "value", "g", "beta"))
    y, state = torch.ops.ingot.gated_delta_rule(q, k, v, g, beta, state, *step, 1e-6 if a["use_qk_l2norm_in_kernel"] else 0.0)
    return y.unsqueeze(0), state


def _wkv_state(a: Arguments) -> tuple[str, StateSpec]:
    return "wkv_state", StateSpec("slot", "slot", torch.float32, (3, int(a["key"].shape[-1])))


def _wkv(a: Arguments, state: torch.Tensor, step: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    y, state = torch.ops.ingot.wkv(a["key"].squeeze(0), a["value"].squeeze(0), -torch.exp(a["time_decay"]), a["time_first"], state, *step)
    return y.unsqueeze(0), state


_GATED_DELTA_RULE = Kernel(_delta_state, _delta, lambda a: a["key"].shape[1], negative=("g",), unit=("beta",), pairs=True)
KERNELS = {
    "mamba_selective_scan": Kernel(_selective_state, _selective, lambda a: a["hidden_states"].shape[-1], negative=("A",)),
    "causal_conv1d_fn": Kernel(_conv_state, _conv, lambda a: a["hidden_states"].shape[-1]),
    "mamba2_chunk_scan": Kernel(_ssd_state, _ssd, lambda a: a["hidden_states"].shape[1], negative=("A",)),
    "torch_chunk_gated_delta_rule": _GATED_DELTA_RULE,
    "chunk_kimi_delta_attention": _GATED_DELTA_RULE,
    "rwkv_linear_attention": Kernel(_wkv_state, _wkv, lambda a: a["key"].shape[1], pairs=True),
}
DEFAULTS: Arguments = {
    **{"bias": None, "activation": None, "D": None, "z": None},
    **{"dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, float("inf"))},
    **{"delta_bias": None, "delta_softplus": False},
}
