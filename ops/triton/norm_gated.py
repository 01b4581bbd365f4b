"""RMSNorm over groups of channels with a gate: a program normalizes whole groups in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ..dims import product
from ..kernel import Call, Candidate, Operand, Steps, claims
from ..target import Target
from .activations import activate
from .norm import MAX_WIDTH
from .sequences import aligned
from .source import launch, most, power_of_two, rows, supported


@triton.jit
def rms_norm_gated_kernel(x, gate, weight, out, num_groups, x_pitch, gate_pitch, EPS: tl.constexpr, ACT: tl.constexpr, NORM_FIRST: tl.constexpr,
                          D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows of D channels are groups of WIDTH."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_D)
    mask = (i < num_groups)[:, None] & (col < WIDTH)[None, :]
    row = (i // (D // WIDTH)).to(tl.int64)[:, None]
    channel = (i % (D // WIDTH) * WIDTH)[:, None] + col[None, :]
    h = tl.load(x + row * aligned(x_pitch, x, D) + channel, mask=mask, other=0.0).to(tl.float32)
    g = activate(tl.load(gate + row * aligned(gate_pitch, gate, D) + channel, mask=mask, other=0.0).to(tl.float32), ACT)
    if not NORM_FIRST:
        h *= g
    h *= tl.rsqrt(tl.sum(h * h, 1) / WIDTH + EPS)[:, None]
    if weight is not None:
        h *= tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    if NORM_FIRST:
        h *= g
    tl.store(out + row * D + channel, h.to(out.dtype.element_ty), mask=mask)


@claims("rms_norm_gated", "triton")
def rms_norm_gated(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    x = call.args["x"]
    width, count = x.shape[-1], rows(x)
    group = call.args["group"] or width
    if not supported(call) or not isinstance(width, int) or group > MAX_WIDTH:
        return []
    groups = product(count, width // group)
    flat = len(x.shape) == 2  # of more dims, rows of the last are not those that lie apart
    operands = {n: Operand(arg=n, rows=flat and n != "weight") for n in ("x", "gate", "weight")} | {"out": Operand(out=0), "num_groups": Operand(size=groups)}
    operands |= {f"{n}_pitch": Operand(pitch=n) if flat else Operand(const=width) for n in ("x", "gate")}
    block_d = power_of_two(group)
    block_m = min(max(1, 1024 // block_d), power_of_two(most(groups, steps)))
    constants = {"EPS": call.args["eps"], "ACT": call.args["act"], "NORM_FIRST": call.args["norm_first"], "D": width, "WIDTH": group,
                 "BLOCK_M": block_m, "BLOCK_D": block_d}  # fmt: skip
    functions = [rms_norm_gated_kernel, activate, aligned]
    return [
        Candidate(f"groups{block_m}_w{warps}", (launch(call, functions, operands, constants, ((groups, block_m),), num_warps=warps),), rank=rank)
        for rank, warps in enumerate((8, 4) if block_m * block_d <= 2048 else (16, 8))
    ]
