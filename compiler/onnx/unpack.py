"""The weights of a model out of those that were packed for its kernels: recipes, run backwards."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ingot.ops import Recipe

from .writer import OnnxError


def unpack(name: str, recipe: Recipe, tensor: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors from which `recipe` makes the weight `tensor`, by name; `shapes` are theirs. OnnxError when they cannot be told from it."""
    meta = {n: torch.empty(s, device="meta") for n, s in shapes.items()}

    def parts(recipe: Recipe, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        match recipe.op:
            case "tensor":
                return {recipe.params[0]: tensor}
            case "constant":
                return {}
            case "cat":
                pieces = tensor.split([i.run(meta, {}).shape[recipe.params[0]] for i in recipe.inputs], recipe.params[0])
            case "stack":
                pieces = tensor.unbind(recipe.params[0])
            case "transpose":
                pieces = (tensor.transpose(*recipe.params),)
            case "reshape":
                pieces = (tensor.reshape(recipe.inputs[0].run(meta, {}).shape),)
            case _:
                raise OnnxError(f"the weight {name} was made by {recipe.op!r}, which cannot be undone; export the model that the artifact was compiled from")
        found: dict[str, torch.Tensor] = {}
        for inner, piece in zip(recipe.inputs, pieces, strict=True):
            found |= parts(inner, piece)
        return found

    return parts(recipe, tensor)
