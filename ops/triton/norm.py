"""RMSNorm, with or without a residual that is added first: a program normalizes whole rows in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ..kernel import Call, Candidate, Operand, Steps, claims
from ..target import Target
from .source import launch, most, power_of_two, rows, supported

MAX_WIDTH = 1 << 15


@triton.jit
def rms_norm_kernel(x, residual, weight, out, total, num_rows, EPS: tl.constexpr, OFFSET: tl.constexpr, D: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The weight comes from memory and the rows from L2: it is asked for while the predecessor ends."""
    col = tl.arange(0, BLOCK_D)
    if weight is not None:
        gain = tl.load(weight + col, mask=col < D, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (row < num_rows)[:, None] & (col < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        rounded = h.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        h = rounded.to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h, 1) / D + EPS)[:, None]
    if weight is not None:
        h *= gain.to(tl.float32)[None, :] + OFFSET
    tl.store(out + at, h.to(out.dtype.element_ty), mask=mask)


def _candidates(call: Call, steps: Steps, residual: bool) -> list[Candidate]:
    x = call.args["x"]
    width, count = x.shape[-1], rows(x)
    if not supported(call) or not isinstance(width, int) or width > MAX_WIDTH:
        return []
    operands = {"x": Operand(arg="x")}
    if residual:
        operands["residual"] = Operand(arg="residual")
    operands |= {"weight": Operand(arg="weight"), "out": Operand(out=0)}
    if residual:
        operands["total"] = Operand(out=1)
    operands["num_rows"] = Operand(size=count)
    block_d = power_of_two(width)
    block_m = min(max(1, 1024 // block_d), power_of_two(most(count, steps)))
    constants = {"EPS": call.args["eps"], "OFFSET": call.args["offset"], "D": width, "BLOCK_M": block_m, "BLOCK_D": block_d}
    if not residual:
        constants |= {"residual": None, "total": None}
    return [
        Candidate(f"rows{block_m}_w{warps}", (launch(call, [rms_norm_kernel], operands, constants, ((count, block_m),), num_warps=warps),), rank=rank)
        for rank, warps in enumerate((8, 4) if block_m * block_d <= 2048 else (16, 8))
    ]


@claims("rms_norm", "triton")
def rms_norm(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, residual=False)


@claims("add_rms_norm", "triton")
def add_rms_norm(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, residual=True)
