"""Rotary position embedding: the tables of a step, and rotations in all the styles of `ops.rotary`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..kernel import Call, Candidate, Operand, Steps, claims
from ..target import Target
from .source import launch, power_of_two, supported


@triton.jit
def rotary_embedding_kernel(positions, inv_freq, cos, sin, num_tokens, SCALING: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
                            BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """WIDTH frequencies; a table row holds them once (HALF) or twice."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    col = tl.arange(0, BLOCK)
    mask = (token < num_tokens)[:, None] & (col < WIDTH)[None, :]
    position = tl.load(positions + token, mask=token < num_tokens, other=0).to(tl.float32)
    angle = position[:, None] * tl.load(inv_freq + col, mask=col < WIDTH, other=0.0).to(tl.float32)[None, :]
    c = tl.cos(angle) * SCALING
    s = tl.sin(angle) * SCALING
    at = token[:, None] * (WIDTH if HALF else 2 * WIDTH) + col[None, :]
    tl.store(cos + at, c, mask=mask)
    tl.store(sin + at, s, mask=mask)
    if not HALF:
        tl.store(cos + at + WIDTH, c, mask=mask)
        tl.store(sin + at + WIDTH, s, mask=mask)


@triton.jit
def rotation(j, R: tl.constexpr, STYLE: tl.constexpr, HALF: tl.constexpr):
    """For result column j < R: (own column, partner's column, the partner's sign, column of the tables)."""
    first = j < R // 2
    folded = tl.where(first, j, j - R // 2)
    if STYLE == "neox":
        return j, tl.where(first, j + R // 2, j - R // 2), tl.where(first, -1.0, 1.0), folded if HALF else j
    elif STYLE == "dsv3":
        return 2 * folded + tl.where(first, 0, 1), 2 * folded + tl.where(first, 1, 0), tl.where(first, -1.0, 1.0), folded if HALF else j
    else:
        tl.static_assert(STYLE == "gptj" or STYLE == "gptj_dup", "unknown rotary style")
        return j, j ^ 1, tl.where(j % 2 == 0, -1.0, 1.0), j // 2 if HALF or STYLE == "gptj_dup" else j


@triton.jit
def rope_kernel(x, cos, sin, out, H: tl.constexpr, E: tl.constexpr, R: tl.constexpr, TABLE: tl.constexpr, STYLE: tl.constexpr, HALF: tl.constexpr,
                BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    j = tl.arange(0, BLOCK_E)
    own, partner, sign, column = rotation(j, R, STYLE, HALF)
    row = token * H * E + head[:, None] * E
    mask = (head < H)[:, None] & (j < E)[None, :]
    h = tl.load(x + row + tl.where(j < R, own, j)[None, :], mask=mask, other=0.0)
    p = tl.load(x + row + partner[None, :], mask=mask & (j < R)[None, :], other=0.0).to(tl.float32)
    c = tl.load(cos + token * TABLE + column, mask=j < R, other=1.0).to(tl.float32)
    s = tl.load(sin + token * TABLE + column, mask=j < R, other=0.0).to(tl.float32)
    turned = h.to(tl.float32) * c[None, :] + p * (s * sign)[None, :]
    tl.store(out + row + j[None, :], turned.to(out.dtype.element_ty), mask=mask)


def style_constants(style: str, table_width: int) -> dict[str, Any]:
    """STYLE, HALF, the rotated width R and the tables' width for `rotation`."""
    half = style.endswith("_half")
    return {"STYLE": style.removesuffix("_half"), "HALF": half, "R": table_width * (2 if half else 1), "TABLE": table_width}


@claims("rotary_embedding", "triton")
def rotary_embedding(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    positions, inv_freq = call.args["positions"], call.args["inv_freq"]
    width, count = inv_freq.shape[0], positions.shape[0]
    if not supported(call) or len(positions.shape) != 1:
        return []
    block = power_of_two(width)
    block_t = max(1, 512 // block)
    operands = {"positions": Operand(arg="positions"), "inv_freq": Operand(arg="inv_freq"), "cos": Operand(out=0), "sin": Operand(out=1),
                "num_tokens": Operand(size=count)}  # fmt: skip
    constants = {"SCALING": call.args["scaling"], "HALF": call.args["half"], "WIDTH": width, "BLOCK_T": block_t, "BLOCK": block}
    return [Candidate(f"t{block_t}", (launch(call, [rotary_embedding_kernel], operands, constants, ((count, block_t),)),))]


@claims("rope", "triton")
def rope(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    x, cos = call.args["x"], call.args["cos"]
    if not supported(call) or len(x.shape) != 3:
        return []
    tokens, heads, width = x.shape
    block_e = power_of_two(width)
    block_h = min(power_of_two(heads), max(1, 2048 // block_e))
    operands = {"x": Operand(arg="x"), "cos": Operand(arg="cos"), "sin": Operand(arg="sin"), "out": Operand(out=0)}
    constants = {"H": heads, "E": width, "BLOCK_H": block_h, "BLOCK_E": block_e} | style_constants(call.args["style"], cos.shape[-1])
    one = launch(call, [rope_kernel, rotation], operands, constants, ((tokens, 1), (heads, block_h)))
    return [Candidate(f"h{block_h}", (one,))]
