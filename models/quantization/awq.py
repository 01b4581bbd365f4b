"""AWQ checkpoints (Lin et al. 2023) in AutoAWQ's "gemm" layout.

qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]; the eight codes of a word are columns 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ingot.ops.graph import Recipe

from .method import Method, dequantized, integer_format, method, tensor, turned

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column that each four bits hold, from the low ones up."""


@method
class Awq(Method):
    name = "awq"
    markers = (".qweight",)
    suffixes = (".qweight", ".qzeros", ".scales")
    excludes = "modules_to_not_convert"
    harmless = frozenset("do_fuse fuse_max_seq_len modules_to_fuse exllama_config backend".split())

    def read(self) -> set[str]:
        self.one_of("bits", 4, 4)
        self.group = self.one_of("group_size", 128, 32, 64, 128, -1)
        self.one_of("zero_point", True, True)
        self.one_of("version", "gemm", "gemm", "GEMM")
        return {"bits", "group_size", "zero_point", "version"}

    def scheme(self, module: str) -> tuple[str, str] | None:
        return None if self.is_excluded(module) else (integer_format(4, self.group, True), "none")

    def weight(self, module: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, torch.Tensor]) -> Recipe:
        packed, scales = meta[f"{module}.qweight"], meta[f"{module}.scales"]
        k, n = packed.shape[0], packed.shape[1] * 8
        groups = 1 if self.group == -1 else -(-k // self.group)
        if tuple(scales.shape) != (groups, n):
            raise self.error("group_size", f"makes {groups} groups of the {k} columns of {module}; its scales are {list(scales.shape)}")
        codes, zero = (turned(Recipe("unpack", (4, n, ORDER), (tensor(f"{module}.{name}"),))) for name in ("qweight", "qzeros"))
        form, activation = self.scheme(module) or ("", "")
        return dequantized(form, activation, (codes, turned(tensor(f"{module}.scales")), zero), meta)
