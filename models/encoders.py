"""Encoders: models that are trained on masked tokens, and what a packed step must tell them.

What is traced is the base model, up to its last hidden state; heads are not part of an embedding.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from ingot.ops import Graph

from .swaps.context import TraceError
from .swaps.masks import Mask


def architecture(config: transformers.PreTrainedConfig) -> str | None:
    """Name of the class that makes the hidden states, when `config` describes an encoder; None when it is no encoder, or one that is told to decode."""
    causal = set(config.architectures or []) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if causal or decodes or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return None
    names = MODEL_MAPPING_NAMES[config.model_type]
    return names if isinstance(names, str) else names[0]


def runner(model: torch.nn.Module) -> Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]:
    """How models like this one run on a packed batch of ids [1, T] and positions [1, T], which count from 0 in each sequence → hidden states [1, T, D]."""
    offset = position_offset(model)
    known = inspect.signature(model.forward).parameters

    def run(model: torch.nn.Module, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        types = torch.zeros(1, dtype=torch.int32, device=input_ids.device)  # of every token: one row, added to all
        # the mask is given so that no model makes one, of ones or otherwise
        given = {"position_ids": positions + offset if offset else positions, "token_type_ids": types, "attention_mask": Mask(causal=False)}
        hidden: torch.Tensor = model(input_ids=input_ids, **{n: v for n, v in given.items() if n in known}).last_hidden_state
        return hidden

    return run


def position_offset(model: torch.nn.Module) -> int:
    """What the model adds to positions that count from 0: RoBERTa and its kin begin behind the padding's position.

    Read off the function by which the model numbers the tokens of a sequence without padding; TraceError if it does something else.
    """
    for owner, number in _numberings(model):
        padding: int = owner.padding_idx
        ids = torch.full((1, 7), padding + 1, dtype=torch.int32)
        offsets = (number(ids, padding) - torch.arange(7)).unique()
        if len(offsets) != 1:
            raise TraceError(
                f"{type(owner).__name__}: create_position_ids_from_input_ids does not count on from one number; packed, its positions are not known"
            )
        return int(offsets)
    return 0


def padding_id(model: torch.nn.Module) -> int:
    """The token that the model skips when it counts positions, so that a text must not contain it; −1 when there is none."""
    return next((int(owner.padding_idx) for owner, _ in _numberings(model)), -1)


def _numberings(model: torch.nn.Module) -> Iterator[tuple[Any, Callable[[torch.Tensor, int], torch.Tensor]]]:
    """Modules that number tokens by themselves, with the function (ids, padding) → positions."""
    name = "create_position_ids_from_input_ids"
    for module in model.modules():
        number = getattr(module, name, None) or vars(sys.modules[type(module).__module__]).get(name)
        if number is not None and isinstance(getattr(module, "padding_idx", None), int):
            yield module, number


def pool_sequences(graph: Graph) -> Graph:
    """`graph` (changed in place) with its hidden states [T, D] pooled to an embedding [S, D] of each sequence."""
    output = graph.fx.output_node()
    hidden, *states = list(output.args[0])  # type: ignore[call-overload]
    placeholders = graph.placeholders
    with graph.fx.inserting_before(output):
        pooled = graph.call(torch.ops.ingot.pool.default, hidden, placeholders["cu_seqlens_q"], placeholders["pooling"])
    output.args = ([pooled, *states],)
    return graph
