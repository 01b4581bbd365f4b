"""What a method of quantizing checkpoints must tell."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ingot.ops import formats
from ingot.ops.errors import IngotError
from ingot.ops.graph import Recipe

KV_SCALES = (".k_scale", ".v_scale")
"""How the names of calibrated scales of a KV cache end; before it stands the attention module's name."""
METHODS: dict[str, type[Method]] = {}
"""By `quant_method`; the files of this folder fill it."""


class QuantizationConfigError(IngotError):
    """A quantization config that is unknown, or contradicts itself or the checkpoint; the message names the key."""


class Method(ABC):
    """A method, as configured. `markers` end the name of a tensor that each quantized module has, `suffixes` those of all its tensors."""

    name: str
    markers: tuple[str, ...]
    suffixes: tuple[str, ...]
    excludes: str
    """The key that lists modules which stay as they are."""
    kv_cache: str = ""
    """What the checkpoint was calibrated to keep its KV cache in, "fp8" or "int8", with a scale for k and one for v in each layer; "": nothing."""
    harmless: frozenset[str] = frozenset()
    """Keys that say how the checkpoint was made, and nothing of what it means."""

    def __init__(self, keys: dict[str, Any]) -> None:
        self.keys = keys
        self.input_scales: dict[float, str] = {}
        known = self.read()
        if unknown := sorted(set(keys) - known - self.harmless - {self.excludes}):
            raise self.error(unknown[0], "is not understood; what it says may change what the weights mean")

    @abstractmethod
    def read(self) -> set[str]:
        """Check the keys that matter, and return their names."""

    @abstractmethod
    def scheme(self, module: str) -> tuple[str, str] | None:
        """(format, activation) of a module's weight, None if it stays as it is."""

    @abstractmethod
    def weight(self, module: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, torch.Tensor]) -> Recipe:
        """The weight [N, K] that a module's tensors mean."""

    def error(self, key: str, problem: str) -> QuantizationConfigError:
        value = self.keys
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return QuantizationConfigError(f"quantization_config.{key} {value!r} {problem}")

    def one_of(self, key: str, default: Any, *known: Any) -> Any:
        """The key's value, which must be one of `known`."""
        value = self.keys.get(key, default)
        if value not in known or isinstance(value, bool) != isinstance(known[0], bool):
            self.keys.setdefault(key, value)
            raise self.error(key, f"is not supported; use {' or '.join(map(str, known))}")
        return value

    def kv_scheme(self) -> str:
        """`kv_cache`, as the key kv_cache_scheme says it."""
        scheme = self.keys.get("kv_cache_scheme")
        if not scheme:
            return ""
        plain = (scheme.get("num_bits"), scheme.get("strategy"), scheme.get("symmetric", True), scheme.get("dynamic", False))
        if plain != (8, "tensor", True, False) or scheme.get("type") not in ("float", "int"):
            raise self.error("kv_cache_scheme", "is not supported; use 8 bits, symmetric, static, with strategy tensor")
        return "fp8" if scheme["type"] == "float" else "int8"

    def is_excluded(self, module: str) -> bool:
        """Whether the config leaves a module alone: it, or a module that holds it, is listed."""
        return any(e in (module, module.removeprefix("model.")) or f".{e}." in f".{module}." for e in self.keys.get(self.excludes) or ())


def method(cls: type[Method]) -> type[Method]:
    """Make a method known."""
    METHODS[cls.name] = cls
    return cls


def integer_format(bits: int, group: int, zero: bool) -> str:
    """The name of the format with these properties."""
    return f"int{bits}_{'channel' if group == -1 else f'group{group}'}{'_zero' if zero else ''}"


def dequantized(form: str, activation: str, parts: Iterable[Recipe], meta: Mapping[str, torch.Tensor], input_scale: Recipe | None = None) -> Recipe:
    """The float weight of plain parts."""
    codes, scale, *rest = parts
    n, k = codes.run(meta, {}).shape
    dtype = torch.float32 if form.startswith("fp8") else scale.run(meta, {}).dtype
    inputs = (codes, scale, *rest, *((input_scale,) if input_scale is not None else ()))
    assert len(inputs) >= len(formats.get(form).parts)
    return Recipe("dequantize", (form, activation, str(dtype).removeprefix("torch."), n, k), inputs)


def tensor(name: str) -> Recipe:
    return Recipe("tensor", (name,))


def turned(recipe: Recipe) -> Recipe:
    return Recipe("transpose", (0, 1), (recipe,))


def matches(module: str, patterns: Iterable[str]) -> bool:
    """Whether a module is named, or matched by a pattern that begins with "re:"."""
    return any(bool(re.match(p[3:], module)) if p.startswith("re:") else p == module for p in patterns)


class Orders:
    """Groups of columns in act order: g_idx [K] gives each column's group. Equal ones of several modules become one recipe."""

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}

    def of(self, name: str, group: int, tensors: Mapping[str, torch.Tensor], complain: Callable[[str], Exception]) -> Recipe | None:
        """The order in which the columns' groups are contiguous; None when it is their own."""
        groups = tensors[name]
        k = len(groups)
        if torch.equal(groups.long(), torch.arange(k) // group):
            return None
        if not torch.equal(groups.long().sort().values, torch.arange(k) // group):
            raise complain(f"is {group}, and {name} does not give every group as many columns")
        return Recipe("argsort", (), (tensor(self._first.setdefault(groups.numpy().tobytes(), name)),))

    @staticmethod
    def in_order(codes: Recipe, order: Recipe | None) -> Recipe:
        """Codes [N, K] with their columns in that order."""
        return codes if order is None else Recipe("index", (1,), (codes, order))

    @staticmethod
    def back(weight: Recipe, order: Recipe | None) -> Recipe:
        """A weight [N, K] in the model's own order again."""
        return weight if order is None else Recipe("index", (1,), (weight, Recipe("argsort", (), (order,))))
