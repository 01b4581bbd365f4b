"""AWQ (Lin et al. 2023): columns with large inputs are made larger before rounding, and what makes these inputs smaller in return.

What makes them: the weight of the norm before, or the rows of the up projection before a down projection. Where neither is there, or
something else reads the value too, only the ends of the ranges are chosen. Inputs are those of the weights before rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ingot.ops.formats.integer import Integer

from ..passes.match import argument, aten, calls, ingot, through_reshapes
from .algorithm import ALGORITHMS, Algorithm, Inputs, grouped, parts_of, rounded, scales_for, to_round

EXPONENTS = 20
"""How many are tried between 0 and 1: a column's factor is a power of its inputs' mean size."""


@dataclass(frozen=True)
class _Waiting:
    """A weight whose rows may still be scaled: it is rounded when the linear behind it has been seen."""

    weight: torch.Tensor
    inputs: Inputs


class Awq(Algorithm):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rows_for = {up.args[1].name: node for node in self.graph.fx.nodes if (up := self._up_before(node)) is not None}
        self.waiting: dict[str, _Waiting] = {}

    def at(self, linears: list[fx.Node], inputs: Inputs) -> None:
        names = list(dict.fromkeys(node.args[1].name for node in linears))
        weights = {name: self.forward.weight(name).float() for name in names}
        norm, up = self._norm_before(linears), self._up_before(linears[0]) if len(names) == 1 else None
        if norm is not None or up is not None:
            factor = self._factor(weights, inputs)
            weights, inputs = {name: w * factor for name, w in weights.items()}, inputs.scaled(1 / factor)
            if norm is not None:
                self._scale_norm(norm, factor)
            else:
                waiting = self.waiting.pop(up.args[1].name)
                self._round(up.args[1].name, waiting.weight / factor[:, None], waiting.inputs)
        for name, weight in weights.items():
            if name in self.rows_for:
                self.waiting[name] = _Waiting(weight, inputs)
            else:
                self._round(name, weight, inputs)

    def _round(self, name: str, weight: torch.Tensor, inputs: Inputs) -> None:
        form, dtype = self.format_of(name), self.scale_dtype(name)
        scale = scales_for(weight, form, inputs.moments, dtype)
        meaning = rounded(grouped(weight, form), scale[..., None], form).flatten(1)[:, : weight.shape[1]]
        self.results[name] = {n: p.cpu() for n, p in parts_of(meaning, scale, form, dtype).items()}

    def _factor(self, weights: dict[str, torch.Tensor], inputs: Inputs) -> torch.Tensor:
        """The factor [K] of columns with which the products of all the weights change least."""
        size = inputs.magnitude.clamp(min=1e-4)
        best, chosen = float("inf"), torch.ones_like(size)
        for i in range(EXPONENTS):
            factor = size ** (i / EXPONENTS)
            factor = factor / (factor.max() * factor.min()).sqrt()
            error = 0.0
            for name, weight in weights.items():
                wrong = self._nearest(weight * factor, self.format_of(name)) / factor - weight
                error += float((wrong @ inputs.moments * wrong).sum())
            if error < best:
                best, chosen = error, factor
        return chosen

    @staticmethod
    def _nearest(weight: torch.Tensor, form: Integer) -> torch.Tensor:
        return form.dequantize(form.quantize(weight))

    def _scale_norm(self, norm: fx.Node, factor: torch.Tensor) -> None:
        name, offset = argument(norm, "weight").name, argument(norm, "offset")
        weight = self.forward.weight(name)
        self.results[name] = {"weight": ((weight.float() + offset) / factor - offset).to(weight.dtype).cpu()}

    def _norm_before(self, linears: list[fx.Node]) -> fx.Node | None:
        """The norm whose result the linears, and nothing else, read, if its weight is its own."""
        norm = through_reshapes(linears[0].args[0])
        if not calls(norm, ingot.rms_norm.default) or self._readers(norm) != set(linears):
            return None
        weight = argument(norm, "weight")
        return norm if weight is not None and weight.name in self.graph.weights and len(weight.users) == 1 else None

    def _up_before(self, node: fx.Node) -> fx.Node | None:
        """The linear whose result, times something, is all that this one reads; its weight is rounded too, and nothing else reads either."""
        if not self._is_rounded(node):
            return None
        product = through_reshapes(node.args[0])
        if not calls(product, aten.mul.Tensor) or self._readers(product) != {node}:
            return None
        for factor in product.args:
            up = through_reshapes(factor)
            if self._is_rounded(up) and up.args[2] is None and self._readers(up) == {product} and up.meta["val"].shape[-1] == product.meta["val"].shape[-1]:
                return up
        return None

    def _is_rounded(self, node: Any) -> bool:
        return calls(node, ingot.linear.default) and node.args[1].name in self.graph.weights and to_round(self.graph.weights[node.args[1].name].recipe)

    def _readers(self, node: fx.Node) -> set[fx.Node]:
        """Who reads a value, through reshapes."""
        found: set[fx.Node] = set()
        for user in node.users:
            found |= self._readers(user) if through_reshapes(user) is not user else {user}
        return found


ALGORITHMS["awq"] = Awq
