"""Gated linear units over a merged projection, element by element."""

from __future__ import annotations

import triton
import triton.language as tl

from ..kernel import Call, Candidate, Operand, Steps, claims
from ..target import Target
from .activations import activate, tanh
from .source import launch, power_of_two, rows, supported


@triton.jit
def glu_kernel(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * WIDTH + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + col, (activate(gate, ACT) * up).to(out.dtype.element_ty), mask=mask)


@claims("glu", "triton")
def glu(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    gate_up = call.args["gate_up"]
    width = gate_up.shape[-1] // 2
    if not supported(call):
        return []
    found = []
    for rank, (block, warps) in enumerate(((1024, 4), (2048, 8), (512, 4))):
        block = min(block, power_of_two(width))
        constants = {"WIDTH": width, "BLOCK": block, "ACT": call.args["act"]}
        grid = ((rows(gate_up), 1), (width, block))
        one = launch(call, [glu_kernel, activate, tanh], {"gate_up": Operand(arg="gate_up"), "out": Operand(out=0)}, constants, grid, num_warps=warps)
        found.append(Candidate(f"b{block}_w{warps}", (one,), rank=rank))
    return list({c.name: c for c in found}.values())
