"""`quant_method: fp8`: weights in float8 e4m3 with one scale, or with one for each block of 128 × 128 (DeepSeek-V3, Qwen3).

weight float8_e4m3fn [N, K]; weight_scale, or weight_scale_inv (which is multiplied by all the same); input_scale where activations have
a fixed one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ingot.ops.graph import Recipe

from .method import Method, dequantized, method, tensor


def fp8_weight(
    method: Method, module: str, form: str, activation: str, scale_name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, torch.Tensor]
) -> Recipe:
    """The weight of a module, whose scale may be one, one a row, or one a block."""
    codes, scale = tensor(f"{module}.weight"), tensor(scale_name)
    weight, shape = meta[f"{module}.weight"], meta[scale_name].shape
    if weight.dtype != torch.float8_e4m3fn:
        raise method.error("quant_method" if method.name == "fp8" else "format", f"wants {module}.weight in float8_e4m3fn, and it is {weight.dtype}")
    n, k = weight.shape
    if form.endswith("block128"):
        if tuple(shape) != (-(-n // 128), -(-k // 128)):
            raise method.error("weight_block_size", f"does not fit {scale_name}, which is {list(shape)} for a weight of {n} × {k}")
    elif shape.numel() == 1:
        scale = Recipe("expand", (n,), (Recipe("reshape", (1,), (scale,)),))
    elif shape.numel() == n:
        scale = Recipe("reshape", (n,), (scale,))
    else:
        raise method.error("quant_method", f"with {scale_name} {list(shape)} for a weight of {n} × {k}: there should be one scale, or one a row")
    return dequantized(form, activation, (codes, scale), meta, input_scale(method, module, tensors) if activation.endswith("static") else None)


def input_scale(method: Method, module: str, tensors: Mapping[str, torch.Tensor]) -> Recipe:
    """The fixed scale of a module's input; modules with equal ones share the recipe, so that those that read the same rows can be joined."""
    if f"{module}.input_scale" not in tensors:
        raise method.error("activation_scheme", f"wants {module}.input_scale, which the checkpoint does not have")
    first = method.input_scales.setdefault(float(tensors[f"{module}.input_scale"]), f"{module}.input_scale")
    return Recipe("reshape", (1,), (tensor(first),))


@method
class Fp8(Method):
    name = "fp8"
    markers = (".weight_scale", ".weight_scale_inv")
    suffixes = (".weight", ".weight_scale", ".weight_scale_inv", ".input_scale")
    excludes = "modules_to_not_convert"
    harmless = frozenset({"scale_fmt", "dequantize", "is_checkpoint_fp8_serialized"})

    def read(self) -> set[str]:
        static = self.one_of("activation_scheme", "dynamic", "dynamic", "static") == "static"
        self.one_of("fmt", "e4m3", "e4m3")
        block = self.keys.get("weight_block_size")
        if block is not None and tuple(block) != (128, 128):
            raise self.error("weight_block_size", "is not supported; blocks are 128 × 128")
        if block is not None and static:
            raise self.error("activation_scheme", "does not go with weight_block_size: rows are then rounded in groups of 128, dynamically")
        self.kv_cache = self.kv_scheme()
        if ignored := self.keys.get("ignored_layers"):
            self.keys[self.excludes] = [*(self.keys.get(self.excludes) or ()), *ignored]
        self.form = "fp8_e4m3_channel" if block is None else "fp8_e4m3_block128"
        self.activation = f"fp8_e4m3_{'group128' if block is not None else 'static' if static else 'token'}"
        return {"activation_scheme", "fmt", "weight_block_size", "ignored_layers", "kv_cache_scheme"}

    def scheme(self, module: str) -> tuple[str, str] | None:
        return None if self.is_excluded(module) else (self.form, self.activation)

    def weight(self, module: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, torch.Tensor]) -> Recipe:
        scale = next(f"{module}{m}" for m in self.markers if f"{module}{m}" in meta)
        return fp8_weight(self, module, self.form, self.activation, scale, tensors, meta)
