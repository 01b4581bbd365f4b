"""Attention masks: transformers' mask functions return what the mask is, instead of a tensor of what it hides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, masking_utils

from . import Patch, Swap, modeling_files
from .context import Context, TraceError


@dataclass(frozen=True)
class Mask:
    """What a token sees: itself and those before it, or all of its sequence unless `causal`.

    `window` w > 0 sees positions less than w away; `chunk` c > 0 the positions of the same block of c.
    """

    window: int = 0
    chunk: int = 0
    causal: bool = True

    ndim = 0  # no tensor: code that would fold a bias into a mask of four dims leaves this one alone

    def to(self, *args: Any, **kwargs: Any) -> Mask:
        """What it hides has no dtype."""
        return self

    def __getitem__(self, index: Any) -> Mask:
        """Code takes the head dim off, or cuts it to the keys there are: what it hides is the same."""
        return self

    def within(self, window: int) -> Mask:
        """This mask, seen through a window."""
        return replace(self, window=window)

    def _computed_with(self, *args: Any) -> Any:
        raise TraceError("the model computes with its attention mask outside transformers' attention interface; it needs an adapter")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _computed_with

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._computed_with()


def _mask_function(name: str, geometry: Callable[[Any], Mask]) -> Callable[..., Mask]:
    def create(config: Any, *args: Any, **kwargs: Any) -> Mask:
        for extra in ("or_mask_function", "and_mask_function", "block_sequence_ids"):
            if kwargs.get(extra) is not None:
                raise TraceError(f"{type(config).__name__}: {name} is given {extra}, which paged attention does not know")
        if getattr(config, "is_causal", True) is False:
            raise TraceError(f"{type(config).__name__}: {name} with is_causal=False; a decoder's step attends to the past only")
        return geometry(config)

    return create


def _refused(name: str, reason: str) -> Callable[..., Mask | None]:
    def create(config: Any, *args: Any, **kwargs: Any) -> Mask | None:
        if "encoder_hidden_states" in kwargs and kwargs["encoder_hidden_states"] is None:
            return None  # the mask of attention over an encoder that a decoder alone does not have
        raise TraceError(f"{type(config).__name__}: {name}: {reason}")

    return create


def _both_ways(name: str, geometry: Callable[[Any], Mask]) -> Callable[..., Mask]:
    def create(config: Any, inputs_embeds: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Mask:
        extras = {n: kwargs.get(n) for n in ("encoder_hidden_states", "past_key_values", "or_mask_function", "and_mask_function")}
        for extra, value in {"attention_mask": attention_mask, **extras}.items():
            if value is not None and value != Mask(causal=False):
                raise TraceError(f"{type(config).__name__}: {name} is given {extra}, which packed attention does not know")
        return geometry(config)

    return create


def _window(config: Any) -> Mask:
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_window", None)
    if not window:
        raise TraceError(f"{type(config).__name__}: a sliding mask without config.sliding_window")
    return Mask(window=int(window))


def _window_both_ways(config: Any) -> Mask:
    return Mask(window=_window(config).window + 1, causal=False)  # transformers counts the distances that are seen, the op those that are less


_ALL = lambda config: Mask(causal=False)
FUNCTIONS: dict[str, dict[str, Callable[..., Mask | None]]] = {
    "forward": {
        "create_causal_mask": _mask_function("create_causal_mask", lambda config: Mask()),
        "create_sliding_window_causal_mask": _mask_function("create_sliding_window_causal_mask", _window),
        "create_chunked_causal_mask": _mask_function("create_chunked_causal_mask", lambda config: Mask(chunk=int(config.attention_chunk_size))),
        **{n: _refused(n, "attention to later tokens has no paged form") for n in ("create_bidirectional_mask", "create_bidirectional_sliding_window_mask")},
    },
    "embed": {
        "create_bidirectional_mask": _both_ways("create_bidirectional_mask", _ALL),
        "create_bidirectional_sliding_window_mask": _both_ways("create_bidirectional_sliding_window_mask", _window_both_ways),
        **{n: _refused(n, "an encoder's step attends in both directions") for n in
           ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")},
    },
}  # fmt: skip
"""By entry point."""


class Masks(Swap):
    """Nothing to verify: attention reads the geometry, and the oracle compares the whole."""

    def __init__(self, model: torch.nn.Module, context: Context) -> None:
        self.files = modeling_files(model)
        self.functions = FUNCTIONS[context.entry_point]

    def observers(self) -> list[Patch]:
        return self.patches()

    def patches(self) -> list[Patch]:
        # it only warns, and looks at the ids to do so
        patches = [Patch(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *args: None)]
        for file in self.files:
            patches += [Patch(file, name, function) for name, function in self.functions.items() if name in vars(file)]
            patches += self._mapping(file)
        return patches + self._mapping(masking_utils)

    def _mapping(self, file: Any) -> list[Patch]:
        """A file may look its mask functions up by layer type."""
        name = "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING"
        if name not in vars(file):
            return []
        replace = {getattr(masking_utils, n): f for n, f in self.functions.items() if hasattr(masking_utils, n)}
        return [Patch(file, name, {kind: replace[f] if callable(f) and f in replace else f for kind, f in vars(file)[name].items()})]
