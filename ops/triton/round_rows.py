"""Rows of activations to eight bits, behind their norm or gated linear unit if there is one: what products of codes multiply.

What stands before the rounding is not rounded itself, so that a launch makes what its op means, and not what two launches would.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..kernel import Launch, Operand, Tensor
from ..quantize import LARGEST
from .activations import activate, tanh
from .quantize import row_scale, to_eight_bits
from .quantized_product import Product
from .source import launch, power_of_two


@triton.jit
def round_rows_kernel(x, added, total, norm_weight, input_scale, codes, scales, num_rows, K: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
                      LARGEST: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, GATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """A program rounds BLOCK_K columns, with EPS all of them, of BLOCK_M rows; GROUP columns (0: all) share one of a row's SCALES.

    EPS: rows are normalized first, and before that what is `added`, and their sum `total` written. GATE: they are gate | up first, [rows, 2K].
    """
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    # what lies in memory, and not in L2, is on its way before x is there
    if norm_weight is not None:
        gain = tl.load(norm_weight + k, mask=k < K, other=0.0)
    if input_scale is not None:
        given = tl.load(input_scale)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    mask = (m < num_rows) & (k < K)
    at = m.to(tl.int64) * K + k
    if GATE is not None:
        gate = x + m.to(tl.int64) * (2 * K) + k
        h = activate(tl.load(gate, mask=mask, other=0.0).to(tl.float32), GATE) * tl.load(gate + K, mask=mask, other=0.0).to(tl.float32)
    else:
        h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if added is not None:
        h += tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + at, h.to(total.dtype.element_ty), mask=mask)
    GROUPS: tl.constexpr = BLOCK_K // GROUP if GROUP > 0 else 1
    factor = 1.0
    if EPS is not None:
        factor = tl.rsqrt(tl.sum(h * h, 1) / K + EPS)[:, None]
        if norm_weight is not None:
            h *= gain.to(tl.float32) + OFFSET
    h = tl.reshape(h, [BLOCK_M * GROUPS, BLOCK_K // GROUPS])
    if input_scale is not None:
        by = given / factor + tl.zeros([BLOCK_M, 1], tl.float32)
    else:
        by = row_scale(h, LARGEST)  # of x before it is normalized, as are the codes: neither reduction waits for the other
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    tl.store(scales + m * SCALES + group, tl.reshape(by, [BLOCK_M, GROUPS]) * factor, mask=(m < num_rows) & (group < SCALES))
    rounded = to_eight_bits(h, by, codes.dtype.element_ty, LARGEST)
    tl.store(codes + at, tl.reshape(rounded, [BLOCK_M, BLOCK_K]), mask=mask)


def rounded(product: Product, gate: str | None = None) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The launch that rounds x, behind its norm if there is one, or its unit `gate`, to scratch 0 and 1: codes and scales."""
    call, tokens, k, group = product.call, product.tokens, product.k, product.x_group
    assert product.codes is not None
    block_k = group if group and call.args["eps"] is None else power_of_two(max(k, group))
    block_m = max(1, min(16, 4096 // block_k))
    scratch = (Tensor(product.codes, (tokens, k)), Tensor(torch.float32, (tokens, -(-k // group) if group else 1)))
    sums = {"added": Operand(arg="added"), "total": Operand(out=1)} if "added" in call.args else {}
    operands = {"x": Operand(arg="x"), **sums, "norm_weight": Operand(arg="norm_weight"), "input_scale": Operand(arg="input_scale")}
    operands |= {"codes": Operand(scratch=0), "scales": Operand(scratch=1), "num_rows": Operand(size=tokens)}
    constants = {"K": k, "GROUP": group, "SCALES": scratch[1].shape[1], "LARGEST": LARGEST[product.codes], "EPS": call.args["eps"],
                 "OFFSET": call.args["offset"], "GATE": gate, "BLOCK_M": block_m, "BLOCK_K": block_k}  # fmt: skip
    constants |= {} if sums else {"added": None, "total": None}
    functions = [round_rows_kernel, row_scale, to_eight_bits, activate, tanh]
    warps = 4 if block_k <= 2048 else 16 if block_k <= 8192 else 32  # few rows wait for the latency of one, and many for as much
    return launch(call, functions, operands, constants, ((tokens, block_m), (k, block_k)), scratch=scratch, num_warps=warps), scratch
