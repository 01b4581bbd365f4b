"""Products with quantized weights: every way that suits a call, of those that the files beside this one hold.

A row alone: a GEMV (`matrix_gemv`, `quantized_gemv`). Activations that are rounded: codes times codes (`scaled_gemm`), generated or the library's.
Others: weights widened in registers (`weight_only_gemm`, `warpgroup_gemm`), or dequantized as a whole for the library (`dequantize`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..chain import chain
from ..kernel import Call, Candidate, Steps, Tensor, claimants, claims
from ..target import Target
from .dequantize import dequantized
from .matrix_gemv import matrix_gemvs
from .quantized_gemv import gemvs
from .quantized_product import Product
from .scaled_gemm import library, scaled_gemms
from .warpgroup_gemm import warpgroup_gemms
from .weight_only_gemm import weight_only_gemms


@claims("quantized_linear", "triton")
def quantized_linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    product = Product.of(call, steps, target)
    if product is None:
        return []
    alone = matrix_gemvs(product) + gemvs(product) if product.rows == 1 else []
    rank, most = (1.0, 3) if alone else (0.0, None)
    if call.args["eps"] is not None and product.codes is None:
        return alone + _behind_norm(product, rank)[:most]
    if product.codes is not None:
        return alone + _of_codes(product, rank, most)
    found = alone + [replace(c, rank=rank + i / 10) for i, c in enumerate(weight_only_gemms(product)[:most])]
    return warpgroup_gemms(product) + found + dequantized(product) if product.rows > 64 else found


@claims("glu_quantized_linear", "triton")
def glu_quantized_linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """A unit before rounded rows is part of their rounding."""
    x = call.args["x"]
    product = _rounding(call, steps, target, x=Tensor(x.dtype, (*x.shape[:-1], x.shape[-1] // 2)), act=None, norm_weight=None, eps=None, offset=0.0)
    return [] if product is None else _of_codes(product, gate=call.args["gate"])


@claims("add_rms_norm_quantized_linear", "triton")
def add_rms_norm_quantized_linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """So is a norm, with the sum that it is of."""
    product = _rounding(call, steps, target, residual=None)
    return [] if product is None else _of_codes(product)


def _rounding(call: Call, steps: Steps, target: Target, **inner: Any) -> Product | None:
    """The product with rounded rows in a call that is more than that: its arguments, and `inner` ones."""
    product = Product.of(Call("quantized_linear", call.args | {"zero": None} | inner, call.results), steps, target)
    return None if product is None or product.codes is None else product


def _of_codes(product: Product, rank: float = 0.0, most: int | None = None, gate: str | None = None) -> list[Candidate]:
    found = [replace(c, rank=rank + i / 10) for i, c in enumerate(scaled_gemms(product, gate)[:most])]
    return found + library(product, gate) if product.rows > 16 else found


def _behind_norm(product: Product, rank: float) -> list[Candidate]:
    """A norm of its own, then every way to multiply."""
    call, x = product.call, product.x
    norm = Call("rms_norm", {"x": x, "weight": call.args["norm_weight"], "eps": call.args["eps"], "offset": call.args["offset"]}, (x,))
    plain = Call(call.op, call.args | {"norm_weight": None, "eps": None}, call.results)
    tails = [c for c in claimants(plain, product.steps, product.target) if not c.name.startswith(("gemv", "matrix"))]
    heads = claimants(norm, product.steps, product.target)[:1]
    return [replace(chain(head, x, "x", tail, {"weight": "norm_weight"}), rank=rank + tail.rank) for head in heads for tail in tails]
