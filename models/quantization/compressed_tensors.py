"""`quant_method: compressed-tensors`: float-quantized (FP8), int-quantized (weights in int8), pack-quantized (4 or 8 bits in int32).

weight or weight_packed int32 [N, ⌈K·bits/32⌉], weight_scale [N, G] or [1], weight_zero_point (packed: int32 [⌈N·bits/32⌉, G]), weight_g_idx,
weight_shape, input_scale. Codes are signed, and packed with half of their range added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ingot.ops.graph import Recipe

from .fp8 import fp8_weight
from .method import Method, Orders, dequantized, integer_format, matches, method, tensor

_FORMATS = {"float-quantized": "float", "naive-quantized": None, "int-quantized": "int", "pack-quantized": "int"}


@method
class CompressedTensors(Method):
    name = "compressed-tensors"
    markers = (".weight_scale",)
    suffixes = tuple(f".{n}" for n in "weight weight_packed weight_scale weight_zero_point weight_g_idx weight_shape input_scale input_zero_point".split())
    excludes = "ignore"
    harmless = frozenset("quantization_status global_compression_ratio version compression_ratio".split())

    def read(self) -> set[str]:
        self.orders = Orders()
        self.groups = self.keys.get("config_groups")
        if not isinstance(self.groups, Mapping) or not self.groups:
            raise self.error("config_groups", "should name at least one group of layers")
        self.one_of("format", "pack-quantized", *_FORMATS)
        for key in ("sparsity_config", "transform_config"):
            value = self.keys.get(key)
            if value and value.get("format", "dense" if key == "sparsity_config" else None) != "dense":
                raise self.error(key, "is not supported")
        self.kv_cache = self.kv_scheme()
        self.schemes = {name: self._scheme(name, group) for name, group in self.groups.items()}
        return {"config_groups", "format", "sparsity_config", "transform_config", "kv_cache_scheme"}

    def _scheme(self, name: str, group: Mapping[str, Any]) -> tuple[str, str]:
        key = f"config_groups.{name}"
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not weights:
            raise self.error(f"{key}.weights", "leaves weights as they are, which is no quantization")
        if group.get("output_activations"):
            raise self.error(f"{key}.output_activations", "is not supported")
        bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
        if kind not in ("int", "float") or bits not in ((8,) if kind == "float" else (4, 8)):
            raise self.error(f"{key}.weights.num_bits", f"of type {kind!r} is not supported; use 4 or 8 of int, or 8 of float")
        if kind == "float":
            if strategy not in ("tensor", "channel", "block") or (strategy == "block" and list(weights.get("block_structure") or ()) != [128, 128]):
                raise self.error(f"{key}.weights.strategy", "is not supported; use tensor, channel, or block with a block_structure of 128 × 128")
            form = "fp8_e4m3_block128" if strategy == "block" else "fp8_e4m3_channel"
        else:
            size = weights.get("group_size") if strategy == "group" else -1
            if strategy not in ("tensor", "channel", "group") or size not in (32, 64, 128, -1):
                raise self.error(
                    f"{key}.weights.{'group_size' if strategy == 'group' else 'strategy'}", "is not supported; use channel, or groups of 32, 64, 128"
                )
            form = integer_format(bits, size, not weights.get("symmetric", True))
        return form, "none" if inputs is None else self._activation(f"{key}.input_activations", inputs)

    def _activation(self, key: str, inputs: Mapping[str, Any]) -> str:
        kind, dynamic, strategy = inputs.get("type", "int"), inputs.get("dynamic", False), inputs.get("strategy")
        if inputs.get("num_bits") != 8 or not inputs.get("symmetric", True):
            raise self.error(f"{key}.{'num_bits' if inputs.get('num_bits') != 8 else 'symmetric'}", "is not supported; activations are symmetric, of 8 bits")
        name = "int8" if kind == "int" else "fp8_e4m3"
        if dynamic and strategy == "token":
            return f"{name}_token"
        if dynamic and strategy == "group" and inputs.get("group_size") in (32, 64, 128):
            return f"{name}_group{inputs['group_size']}"
        if kind == "float" and not dynamic and strategy == "tensor":
            return "fp8_e4m3_static"
        raise self.error(f"{key}.strategy", f"with dynamic {dynamic} is not supported; use dynamic token or group, or for FP8 a static tensor")

    def _group(self, module: str) -> str | None:
        if matches(module, self.keys.get("ignore") or ()):
            return None
        named = [name for name, group in self.groups.items() if matches(module, group.get("targets", ()))]
        return next(iter(named or [name for name, group in self.groups.items() if "Linear" in group.get("targets", ())]), None)

    def scheme(self, module: str) -> tuple[str, str] | None:
        name = self._group(module)
        return None if name is None else self.schemes[name]

    def weight(self, module: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, torch.Tensor]) -> Recipe:
        name = self._group(module) or ""
        form, activation = self.schemes[name]
        if form.startswith("fp8"):
            return fp8_weight(self, module, form, activation, f"{module}.weight_scale", tensors, meta)
        bits, packed = int(form[3]), f"{module}.weight_packed" in meta
        middle, scale = 1 << (bits - 1), meta[f"{module}.weight_scale"]
        if packed:
            # the shape is a tensor, since the last word of a row may be a part
            n, k = map(int, tensors[f"{module}.weight_shape"])
            codes = Recipe("unpack", (bits, k), (tensor(f"{module}.weight_packed"),))
        else:
            if bits != 8 or meta[f"{module}.weight"].dtype != torch.int8:
                raise self.error(f"config_groups.{name}.weights.num_bits", f"does not fit {module}.weight, which is {meta[f'{module}.weight'].dtype}")
            n, k = meta[f"{module}.weight"].shape
            codes = Recipe("add_codes", (middle, 8), (tensor(f"{module}.weight"),))
        size = k if "_channel" in form else int(form.split("group")[1].split("_")[0])
        groups = -(-k // size)
        if scale.numel() not in (n * groups, 1):
            raise self.error(f"config_groups.{name}.weights.group_size", f"makes {groups} groups of {n} × {k} in {module}; its scales are {list(scale.shape)}")
        scales = tensor(f"{module}.weight_scale")
        parts = [codes, Recipe("reshape", (n, groups), (scales,)) if scale.numel() > 1 else Recipe("expand", (n, 1), (Recipe("reshape", (1, 1), (scales,)),))]
        if form.endswith("_zero"):
            parts.append(self._zero(module, bits, n, groups, meta))
        order = None
        if f"{module}.weight_g_idx" in meta:
            order = self.orders.of(f"{module}.weight_g_idx", size, tensors, lambda p: self.error(f"config_groups.{name}.weights.group_size", p))
        parts[0] = Orders.in_order(codes, order)
        return Orders.back(dequantized(form, activation, parts, meta), order)

    def _zero(self, module: str, bits: int, n: int, groups: int, meta: Mapping[str, torch.Tensor]) -> Recipe:
        name = f"{module}.weight_zero_point"
        if name not in meta:
            raise self.error("config_groups", f"has weights that are not symmetric, and {name} is missing")
        zero = tensor(name)
        if meta[name].dtype == torch.int32 and f"{module}.weight_packed" in meta:
            return Recipe("transpose", (0, 1), (Recipe("unpack", (bits, n), (Recipe("transpose", (0, 1), (zero,)),)),))
        return Recipe("add_codes", (1 << (bits - 1), bits), (Recipe("reshape", (n, groups), (zero,)),))
