"""GPTQ checkpoints (Frantar et al. 2022) as AutoGPTQ and GPTQModel write them.

qweight int32 [K·bits/32, N], codes along K from the low bits up; qzeros int32 [G, N·bits/32], along N; scales [G, N]; g_idx int32 [K],
each column's group. Version 1 stores zero points less one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ingot.ops.graph import Recipe

from .method import Method, Orders, dequantized, integer_format, method, tensor, turned


@method
class Gptq(Method):
    name = "gptq"
    markers = (".qweight",)
    suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")
    excludes = "modules_to_not_convert"
    harmless = frozenset(
        "damp_percent damp_auto_increment static_groups true_sequential model_name_or_path model_file_base_name is_marlin_format meta quantizer "
        "dataset tokenizer batch_size block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize use_cuda_fp16 model_seqlen "
        "pad_token_id use_exllama max_input_length exllama_config cache_block_outputs backend lm_head pack_dtype mse disable_exllama autoround_version "
        "act_group_aware hessian format adapter".split()
    )

    def read(self) -> set[str]:
        self.bits = self.one_of("bits", None, 4, 8)
        self.group = self.one_of("group_size", 128, 32, 64, 128, -1)
        self.symmetric = self.one_of("sym", True, True, False)
        self.one_of("desc_act", False, True, False)
        version = self.one_of("checkpoint_format", "gptq", "gptq", "gptq_v2")
        if self.keys.get("is_marlin_format"):
            raise self.error("is_marlin_format", "is not supported: the weights are packed for one kernel; use the checkpoint in GPTQ's own layout")
        if self.keys.get("dynamic"):
            raise self.error("dynamic", "gives modules formats of their own, which is not supported")
        self.missing = 1 if version == "gptq" else 0
        self.orders = Orders()
        return {"bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic"}

    def scheme(self, module: str) -> tuple[str, str] | None:
        return None if self.is_excluded(module) else (integer_format(self.bits, self.group, not self.symmetric), "none")

    def weight(self, module: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, torch.Tensor]) -> Recipe:
        packed, scales, zeros = (meta[f"{module}.{n}"] for n in ("qweight", "scales", "qzeros"))
        n, per_word = packed.shape[1], 32 // self.bits
        k = packed.shape[0] * per_word
        group = k if self.group == -1 else self.group
        if tuple(scales.shape) != (-(-k // group), n):
            what = f"{k} columns of {module} and {-(-k // group)} groups"
            raise self.error("group_size", f"and bits {self.bits} make {what}; its scales are {list(scales.shape)}")
        if tuple(zeros.shape) != (scales.shape[0], -(-n // per_word)):
            raise self.error("bits", f"does not fit {module}.qzeros, which is {list(zeros.shape)}")
        order = self.orders.of(f"{module}.g_idx", group, tensors, lambda p: self.error("group_size", p)) if f"{module}.g_idx" in meta else None
        if order is not None and not self.keys.get("desc_act"):
            raise self.error("desc_act", f"contradicts {module}.g_idx, whose groups are not in the order of the columns")
        codes = Orders.in_order(Recipe("unpack", (self.bits, k), (turned(tensor(f"{module}.qweight")),)), order)
        parts = [codes, turned(tensor(f"{module}.scales"))]
        unpacked = Recipe("unpack", (self.bits, n), (tensor(f"{module}.qzeros"),))
        zero = turned(Recipe("add_codes", (self.missing, self.bits), (unpacked,)))
        if not self.symmetric:
            parts.append(zero)
        elif not bool((zero.run(tensors, {}) == 1 << (self.bits - 1)).all()):
            raise self.error("sym", f"contradicts {module}.qzeros: not every zero point is the middle (is checkpoint_format right?)")
        form, activation = self.scheme(module) or ("", "")
        return Orders.back(dequantized(form, activation, parts, meta), order)
