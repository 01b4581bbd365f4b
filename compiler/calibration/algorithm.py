"""What rounds weights with a text is: an algorithm that sees the inputs of each linear, and how weights are rounded by given scales."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import fx

from ingot.ops import Graph, formats
from ingot.ops.formats.integer import Integer
from ingot.ops.graph import Recipe

from .forward import Forward

Found = dict[str, torch.Tensor]
"""What a weight is made of now: plain parts, or the weight itself."""
ALGORITHMS: dict[str, type[Algorithm]] = {}
"""By name; the files of this folder fill it."""


@dataclass(frozen=True)
class Inputs:
    """What is known of x [T, K]: second moments [K, K] and mean absolute values [K], float32."""

    moments: torch.Tensor
    magnitude: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> Inputs:
        rows = x.flatten(0, -2)
        moments = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        for piece in rows.split(4096):
            moments.addmm_(piece.float().T, piece.float())
        return cls(moments / len(rows), rows.abs().mean(0, dtype=torch.float32))

    def scaled(self, factor: torch.Tensor) -> Inputs:
        """Of x · factor [K]."""
        return Inputs(self.moments * factor * factor[:, None], self.magnitude * factor)


class Algorithm(ABC):
    """Called once for each value that linears with rounded weights read, in the order of the graph."""

    def __init__(self, graph: Graph, forward: Forward) -> None:
        self.graph, self.forward = graph, forward
        self.results: dict[str, Found] = {}

    @abstractmethod
    def at(self, linears: list[fx.Node], inputs: Inputs) -> None:
        """Round the weights of linears that read the same value."""

    def format_of(self, name: str) -> Integer:
        form = formats.get(self.graph.weights[name].recipe.params[0])
        assert isinstance(form, Integer)
        assert not form.zero
        return form

    def scale_dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.graph.weights[name].recipe.params[2])
        return dtype

    def stored(self, folder: Path) -> Iterator[tuple[str, Found]]:
        """Each weight that was found, written to a file of `folder`."""
        for i, (name, tensors) in enumerate(self.results.items()):
            save_file({f"{name}/{part}": t.contiguous().cpu() for part, t in tensors.items()}, folder / f"{i:06}.safetensors")
            yield name, tensors


def to_round(recipe: Recipe) -> bool:
    """Whether a weight is rounded to groups of integers, for which calibration finds better codes; of what has 8 bits there is little to find."""
    return recipe.op == "dequantize" and recipe.params[0].startswith("int4_") and recipe.inputs[0].op == "quantize"


def grouped(values: torch.Tensor, form: Integer) -> torch.Tensor:
    """[N, K] → [N, G, group], zeros at the end."""
    k = values.shape[1]
    group = k if form.group < 0 else form.group
    return F.pad(values, (0, -k % group)).unflatten(1, (-1, group))


def scales_for(weight: torch.Tensor, form: Integer, moments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale [N, G] of each group of weight [N, K] whose rounding changes products least, given the inputs' second moments.

    The range ends between half of the largest absolute value and all of it: what lies beyond is cut, the rest is finer.
    """
    w = grouped(weight, form)
    k, group = weight.shape[1], w.shape[2]
    padded = F.pad(moments, (0, w.shape[1] * group - k, 0, w.shape[1] * group - k))
    blocks = torch.stack([padded[i : i + group, i : i + group] for i in range(0, padded.shape[0], group)])
    largest = w.abs().amax(-1)
    best = torch.full_like(largest, float("inf"))
    scale = torch.ones_like(largest)
    for shrink in torch.linspace(1.0, 0.5, 21).tolist():
        tried = torch.where(largest > 0, largest * shrink / (form.top / 2), 1.0).to(dtype).float()
        wrong = rounded(w, tried[..., None], form) - w
        error = (torch.einsum("ngi,gij->ngj", wrong, blocks) * wrong).sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    return scale


def rounded(w: torch.Tensor, scale: torch.Tensor, form: Integer) -> torch.Tensor:
    """w at the nearest multiple of scale that a code has."""
    return (w / scale).round().clamp(-form.middle, form.top - form.middle) * scale


def parts_of(meaning: torch.Tensor, scale: torch.Tensor, form: Integer, dtype: torch.dtype) -> Found:
    """Plain parts of a weight [N, K] that is made of multiples of scale [N, G]."""
    codes = (meaning / form.columns(scale, meaning.shape[1])).round() + form.middle
    return {"weight": codes.to(torch.uint8), "scale": scale.to(dtype)}
