"""Quantization formats, one file each: how a weight is stored in few bits, what it then means, and how it lies in memory for kernels.

Every file of this folder is a format or a family of them; `get` finds one by name.
"""

from __future__ import annotations

import importlib
import pkgutil

import torch

from ..errors import IngotError
from ..target import Target
from .format import FORMATS, Format, halves, joined

__all__ = ["FormatError", "get", "names", "online", "packed", "unpacked", "unpacked_words"]

LM_HEAD = {"cpu": "int8_channel"}
"""What an LM head is quantized to when a model is, by kind of target: on a CPU it is a third of a small model's bytes. Elsewhere it stays as it is."""
ONLINE = {
    "fp8": ("fp8_e4m3_channel", "fp8_e4m3_token"),
    "int8": ("int8_channel", "int8_token"),
    **{f"int4-g{n}": (f"int4_group{n}", "") for n in (32, 64, 128)},
}
"""What `--quantize` may be: the format of the weights, and how rows of activations are rounded ("": as `Format.activation` says)."""


class FormatError(IngotError):
    """No format has this name; the message lists those that there are."""


def get(name: str) -> Format:
    """The format called `name`."""
    _load()
    if name not in FORMATS:
        raise FormatError(f"quantization format {name!r} is unknown; there are {', '.join(names())}")
    return FORMATS[name]


def names() -> list[str]:
    """Every format, sorted."""
    _load()
    return sorted(FORMATS)


def online(name: str, target: Target) -> tuple[str, str]:
    """(format, activation) of `--quantize NAME`. FormatError lists what NAME may be."""
    if name not in ONLINE:
        raise FormatError(f"--quantize {name} is unknown: use none, {', '.join(ONLINE)}")
    form, activation = ONLINE[name]
    return form, activation or get(form).activation(target)


def packed(parts: dict[str, torch.Tensor], format: str, layout: str, pieces: int) -> dict[str, torch.Tensor]:
    """Plain parts in a layout, `pieces` equal runs of rows packed one after the other."""
    return joined([get(format).pack(p, layout) for p in halves(parts, pieces)])


def unpacked(parts: dict[str, torch.Tensor], format: str, layout: str, n: int, k: int, pieces: int) -> dict[str, torch.Tensor]:
    """The plain parts [n, k] that `packed` packed."""
    return joined([get(format).unpack(p, layout, n // pieces, k) for p in halves(parts, pieces)])


def unpacked_words(words: torch.Tensor, bits: int, count: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """words int32 [R, W] → codes uint8 [R, count]. Code c of a row lies in word c // (32/bits), from the low bits up; with `order`, bits
    i hold the word's code number order[i]."""
    per_word = 32 // bits
    places = sorted(range(per_word), key=lambda i: order[i]) if order else range(per_word)
    shifted = torch.stack([(words >> (bits * i) & ((1 << bits) - 1)).to(torch.uint8) for i in places], -1)
    return shifted.flatten(-2)[:, :count]


def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
