"""The manifest: what an artifact is, in one JSON file that a person can read."""

from __future__ import annotations

from typing import Any

import msgspec
from ingot.ops.target import Target

from .plan import Kernel

SCHEMA_VERSION = 1
KV_LAYOUT = "page:N,K,page_size,E/1"
"""Identifies how KV pages lie in memory, so that pages can be exchanged only between equals."""
CHUNK_BYTES = 64 << 20


class ModelInfo(msgspec.Struct, frozen=True):
    """What a server must know of the model."""

    name: str  # as served: the folder's or hub id's last part
    architecture: str
    model_type: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    num_parameters: int


class Group(msgspec.Struct, frozen=True):
    """States that share one page table, or one slot a sequence. `kind` "page" or "slot"; bytes are summed over the group's states."""

    name: str
    kind: str
    page_size: int  # tokens; 0 for slots
    bytes_per_unit: int  # of a page or slot
    window: int = 0


class State(msgspec.Struct, frozen=True):
    """A tensor that outlives the step: [N, *shape], N the group's pages or slots."""

    name: str
    group: str
    dtype: str
    shape: tuple[int, ...]


class WeightTensor(msgspec.Struct, frozen=True):
    """A packed weight: bytes offset … offset + nbytes of `weights.bin`, or made from `recipe` (seed, std) when there are no bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # −1: generated on the device from the recipe
    nbytes: int
    recipe: Any  # nested lists: ["cat", [dim], [["tensor", ["model.…"], []], …]]


class Options(msgspec.Struct, frozen=True):
    """The flags of `ingot compile` that are part of the key."""

    dtype: str
    quantize: str
    kv_cache_dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    deterministic: bool
    dummy_weights: bool


class Manifest(msgspec.Struct, frozen=True):
    """`key` hashes the inputs listed in `key_inputs`; `digest` the content, `report` apart."""

    schema_version: int
    ingot_version: str
    key: str
    digest: str
    key_inputs: dict[str, str]
    target: Target
    model: ModelInfo
    options: Options
    kv_layout: str
    groups: tuple[Group, ...]
    states: tuple[State, ...]
    weights: tuple[WeightTensor, ...]
    weight_chunks: tuple[str, ...]  # SHA-256 of each CHUNK_BYTES of weights.bin
    variants: tuple[str, ...]  # plans/<name>.json
    kernels: tuple[Kernel, ...]
    files: dict[str, str]  # every other file: relative path → SHA-256
    report: dict[str, Any]  # nodes before and after each pass, kernels by backend, seconds, gate errors
