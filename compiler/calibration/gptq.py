"""GPTQ (Frantar et al. 2022): columns are rounded one after another, and those still to come take up the error of each.

Columns with the largest inputs come first, each with the scale of its own group, which is fixed before: the order helps, and nothing of
it remains in the weight. Later layers see inputs that were computed with the weights rounded so far.
"""

from __future__ import annotations

import torch
from torch import fx

from ingot.ops.formats.integer import Integer

from .algorithm import ALGORITHMS, Algorithm, Inputs, parts_of, rounded, scales_for

DAMPING = 0.01
"""Of the mean second moment, added to all: the inverse exists then, and no column is trusted too far."""
BLOCK = 128
"""Columns whose errors are carried on together to those behind the block."""


class Gptq(Algorithm):
    def at(self, linears: list[fx.Node], inputs: Inputs) -> None:
        order = inputs.moments.diag().argsort(descending=True)
        factor = _factor(inputs.moments, order)
        for name in dict.fromkeys(node.args[1].name for node in linears):
            form, dtype = self.format_of(name), self.scale_dtype(name)
            weight = self.forward.weight(name)
            scale = scales_for(weight.float(), form, inputs.moments, dtype)
            meaning = quantized(weight.float(), scale, form, order, factor)
            self.results[name] = {n: p.cpu() for n, p in parts_of(meaning, scale, form, dtype).items()}
            self.forward.changed[name] = meaning.to(weight.dtype)


def _factor(moments: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped moments, in that order of columns."""
    damped = moments[order][:, order].double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def quantized(weight: torch.Tensor, scale: torch.Tensor, form: Integer, order: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """weight [N, K] rounded to multiples of scale [N, G] within each group, so that its products change little."""
    w = weight[:, order].clone()
    scales = form.columns(scale, weight.shape[1])[:, order]
    out = torch.empty_like(w)
    for begin in range(0, w.shape[1], BLOCK):
        end = min(begin + BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, begin:end])
        for column in range(begin, end):
            out[:, column] = rounded(w[:, column], scales[:, column], form)
            error = (w[:, column] - out[:, column]) / factor[column, column]
            w[:, column + 1 : end] -= error[:, None] * factor[column, column + 1 : end]
            errors[:, column - begin] = error
        w[:, end:] -= errors @ factor[begin:end, end:]
    return out[:, order.argsort()]


ALGORITHMS["gptq"] = Gptq
