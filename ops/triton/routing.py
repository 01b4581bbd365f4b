"""The choice of experts: of a row the largest elements, with their weights; a row fits in the registers of a warp or two."""

from __future__ import annotations

import triton
import triton.language as tl

from ..kernel import Call, Candidate, Operand, Steps, claims
from ..target import Target
from .sampling import key_of, value_of
from .source import FLOATS, TYPES, launch, power_of_two, rows, supported

MAX_WIDTH = 1024


@triton.jit
def route_kernel(logits, weights, ids, X: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, SCALE: tl.constexpr,
                 BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """An element and where it stands are one integer of 64 bits: its order is that of the elements, and of equal ones the first is the largest."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_X)
    i = tl.arange(0, BLOCK_K)
    x = tl.load(logits + row * X + n, mask=n < X, other=float("-inf")).to(tl.float32)
    key = key_of(x, 32).to(tl.int64) << 32 | (BLOCK_X - 1 - n).to(tl.int64)
    least = tl.full([], -(1 << 63), tl.int64)
    key = tl.where(n < X, key, least)
    taken = tl.zeros([BLOCK_K], tl.int64)
    for k in tl.static_range(K):
        best = tl.max(key, 0)
        taken = tl.where(i == k, best, taken)
        key = tl.where(key == best, least, key)
    y = value_of((taken >> 32).to(tl.int32), 32)
    if SOFTMAX:
        largest = tl.max(x, 0)
        y = tl.exp(y - largest)
        if not RENORMALIZE:
            y /= tl.sum(tl.exp(x - largest), 0)
    if RENORMALIZE:
        y /= tl.sum(tl.where(i < K, y, 0.0), 0)
    tl.store(weights + row * K + i, (y * SCALE).to(weights.dtype.element_ty), mask=i < K)
    tl.store(ids + row * K + i, BLOCK_X - 1 - (taken & 0xFFFFFFFF), mask=i < K)


@claims("route", "triton")
def route(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    logits, k = call.args["logits"], call.args["k"]
    width = logits.shape[-1]
    if not supported(call) or logits.dtype not in FLOATS or call.args["dtype"] not in TYPES or not isinstance(width, int) or width > MAX_WIDTH:
        return []
    constants = {"X": width, "K": k, "SOFTMAX": call.args["softmax"], "RENORMALIZE": call.args["renormalize"], "SCALE": call.args["scale"],
                 "BLOCK_X": power_of_two(width), "BLOCK_K": power_of_two(k)}  # fmt: skip
    operands = {"logits": Operand(arg="logits"), "weights": Operand(out=0), "ids": Operand(out=1)}
    return [Candidate("row", (launch(call, [route_kernel, key_of, value_of], operands, constants, ((rows(logits), 1),), num_warps=1 if width <= 256 else 4),))]
