"""Activations of gated linear units, on float32 blocks. The names are those of `ops.glu.ACTIVATIONS`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # Triton has none outside of libdevice; this form saturates to ±1 without overflow
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def activate(x, ACT: tl.constexpr):
    if ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACT == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACT == "relu", "unknown activation")
        return tl.maximum(x, 0.0)
