"""Rows of activations to eight bits, behind their norm if there is one: what products of codes multiply."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..kernel import Launch, Operand, Tensor
from ..quantize import LARGEST
from .quantize import row_scale, to_eight_bits
from .quantized_product import Product
from .source import launch, power_of_two


@triton.jit
def round_rows_kernel(x, norm_weight, input_scale, codes, scales, num_rows, K: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr,
                         EPS: tl.constexpr, OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program rounds BLOCK_M rows, with EPS normalized first, or GROUP columns of them; scales [rows, groups]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    group = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    k = group * GROUP + tl.arange(0, BLOCK_K)[None, :]
    mask = (m < num_rows) & (k < K) & (k < (group + 1) * GROUP)
    at = m.to(tl.int64) * K + k
    h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if EPS is not None:
        h *= tl.rsqrt(tl.sum(h * h, 1) / K + EPS)[:, None]
        if norm_weight is not None:
            h *= tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32) + OFFSET
    if input_scale is not None:
        by = tl.load(input_scale) + tl.zeros([BLOCK_M, 1], tl.float32)
    else:
        by = row_scale(h, LARGEST)
    tl.store(scales + m * tl.num_programs(1) + group, by, mask=m < num_rows)
    tl.store(codes + at, to_eight_bits(h, by, codes.dtype.element_ty, LARGEST), mask=mask)


def rounded(product: Product) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The launch that rounds x, behind its norm if there is one, to scratch 0 and 1: codes and scales."""
    call, tokens, k, group = product.call, product.tokens, product.k, product.x_group
    assert product.codes is not None
    block_k = power_of_two(group or k)
    block_m = max(1, min(16, 4096 // block_k))
    scratch = (Tensor(product.codes, (tokens, k)), Tensor(torch.float32, (tokens, -(-k // group) if group else 1)))
    operands = {n: Operand(arg=n) for n in ("x", "norm_weight", "input_scale")}
    operands |= {"codes": Operand(scratch=0), "scales": Operand(scratch=1), "num_rows": Operand(size=tokens)}
    constants = {"K": k, "GROUP": group or k, "LARGEST": LARGEST[product.codes], "EPS": call.args["eps"], "OFFSET": call.args["offset"],
                 "BLOCK_M": block_m, "BLOCK_K": block_k}  # fmt: skip
    return launch(call, [round_rows_kernel, row_scale, to_eight_bits], operands, constants, ((tokens, block_m), (k, group or k)), scratch=scratch,
                  num_warps=8 if block_k > 2048 else 4), scratch  # fmt: skip
