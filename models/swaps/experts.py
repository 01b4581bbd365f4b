"""Experts of a mixture (`use_experts_implementation`) → `ingot.moe`, or `ingot.grouped_linear` around the module's own gate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ingot.ops.glu import ACTIVATIONS, GATES

from . import Patch, Swap, close
from .context import Context, TraceError


class Experts(Swap):
    """What transformers declares of a class (layout, gate, biases) is taken from it; the gate itself is compared."""

    def __init__(self, model: torch.nn.Module, context: Context) -> None:
        self.modules = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed")]

    def observers(self) -> list[Patch]:
        def only_shape(module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.empty_like(hidden_states)

        return [Patch(cls, "forward", only_shape) for cls in {type(m) for m in self.modules}]

    def patches(self) -> list[Patch]:
        activations = {id(m): _activation(m) for m in self.modules}

        def forward(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            return _experts(module, hidden_states, top_k_index, top_k_weights, activations[id(module)])

        return [Patch(cls, "forward", forward) for cls in {type(m) for m in self.modules}]


def _experts(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, act: str | None) -> torch.Tensor:
    """hidden_states [T, D], experts and their weights [T, A] → [T, D]. With no `act`, the gate is the module's own code."""
    if hidden_states.dim() != 2 or top_k_index.dim() != 2 or top_k_weights.dim() != 2:
        raise TraceError(f"{type(module).__name__}: experts of {hidden_states.dim()}-dimensional tokens; [T, D] is what the dialect has")
    gated, transposed, post_norm = module.has_gate, module.is_transposed, getattr(module, "has_post_expert_norm", False)
    w_in = module.gate_up_proj if gated else module.up_proj
    b_in = getattr(module, "gate_up_proj_bias" if gated else "up_proj_bias") if module.has_bias else None
    b_out = module.down_proj_bias if module.has_bias else None
    out: torch.Tensor
    if act is not None and not post_norm:
        interleaved = gated and not module.is_concatenated
        out = torch.ops.ingot.moe(hidden_states, top_k_index, top_k_weights, w_in, b_in, module.down_proj, b_out, act, gated, transposed, interleaved)
        return out
    active = top_k_index.shape[-1]
    ids = top_k_index.reshape(-1)
    h = torch.ops.ingot.grouped_linear(hidden_states.repeat_interleave(active, 0), w_in, b_in, ids, transposed)
    h = module._apply_gate(h) if gated else module.act_fn(h)
    h = torch.ops.ingot.grouped_linear(h, module.down_proj, b_out, ids, transposed)
    if post_norm:
        h = module.post_expert_norm(h)
    weighted = h.float() * top_k_weights.reshape(-1, 1).float()
    out = weighted.reshape(-1, active, h.shape[-1]).sum(1).to(hidden_states.dtype)
    return out


@functools.cache  # asked first while shapes run: a trace has no values to compare
def activation_name(function: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """The dialect's name of an activation, found by what it computes."""
    h = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)) * 3
    return next((name for name, known in ACTIVATIONS.items() if close(known(h), function(h))), None)


def _activation(module: Any) -> str | None:
    """Name of what the module's gate does with both halves (of its activation, where there is no gate), or None."""
    if not module.has_gate:
        return activation_name(module.act_fn)
    h = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)) * 6  # beyond what gates limit
    expected = module._apply_gate(h)
    gate, up = h.chunk(2, -1) if module.is_concatenated else (h[..., ::2], h[..., 1::2])
    return next((name for name, function in GATES.items() if close(function(gate, up), expected)), None)
