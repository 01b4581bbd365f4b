"""Quantized checkpoints: what their `quantization_config` says, and their tensors as recipes for ordinary weights.

Each method that checkpoints are made with has a file here. What it reads becomes, for every quantized module, the recipe of the
float weight that the module's tensors mean, so that everything after it sees a checkpoint of ordinary weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from ingot.ops.graph import Recipe

from .method import KV_SCALES, METHODS, Method, QuantizationConfigError

__all__ = ["METHODS", "Method", "QuantizationConfigError", "logical", "method_of"]

for _name in ("awq", "compressed_tensors", "fp8", "gptq"):
    importlib.import_module(f"{__name__}.{_name}")


def method_of(config: Any) -> Method | None:
    """What a model's `quantization_config` says; None where there is none. QuantizationConfigError names the key that is not understood."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    keys: dict[str, Any] = dict(found) if isinstance(found, Mapping) else found.to_dict()
    name = keys.pop("quant_method", None)
    if name not in METHODS:
        raise QuantizationConfigError(f"quantization_config.quant_method {name!r} is unknown; known are {', '.join(sorted(METHODS))}")
    return METHODS[name](keys)


def logical(method: Method, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Size], dict[str, Recipe]]:
    """The checkpoint as if it were not quantized: the shape of each tensor it then has, and the recipes of the weights that replace others.

    QuantizationConfigError when tensors are not what the config says.
    """
    modules = dict.fromkeys(n.removesuffix(m) for n in meta for m in method.markers if n.endswith(m))
    if not modules:
        raise QuantizationConfigError(
            f"quantization_config.quant_method is {method.name!r}, and no tensor ends in {' or '.join(method.markers)}: nothing is quantized with it"
        )
    replaced: set[str] = set()
    recipes: dict[str, Recipe] = {}
    shapes: dict[str, torch.Size] = {}
    for module in modules:
        if method.scheme(module) is None:
            raise QuantizationConfigError(f"quantization_config.{method.excludes} leaves {module} alone, and the checkpoint has it quantized")
        recipe = method.weight(module, tensors, meta)
        recipes[f"{module}.weight"] = recipe
        shapes[f"{module}.weight"] = recipe.run(meta, {}).shape
        replaced |= {f"{module}{s}" for s in method.suffixes}
    if method.kv_cache:
        replaced |= {n for n in meta if n.endswith(KV_SCALES)}
    return {n: t.shape for n, t in meta.items() if n not in replaced} | shapes, recipes
