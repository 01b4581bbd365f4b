"""The manifest: what an artifact is, in one JSON file that a person can read."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from ingot.ops.target import Target

from .files import AGAIN, ArtifactError, check_relative
from .plan import Kernel

SCHEMA_VERSION = 6
POOLINGS = ("mean", "cls", "last")
"""How an embedding comes from a text's tokens, in the order of the numbers in the step input `pooling`."""
CHUNK_BYTES = 64 << 20
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"


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


class Embedding(msgspec.Struct, frozen=True):
    """How the entry point `embed` makes the embedding of a text when a request does not say otherwise."""

    dimensions: int
    pooling: str  # one of POOLINGS
    normalize: bool  # to length 1
    padding_id: int  # a token to which the model gives no position, so that no text may contain it; −1: none


class Group(msgspec.Struct, frozen=True):
    """States that share one page table, or one slot a sequence. Bytes are summed over the group's states."""

    name: str
    kind: Literal["page", "slot"]
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
    """A packed weight: bytes offset … offset + nbytes of `weights.bin`, or made from `recipe` when there are no bytes."""

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
    quantize_exclude: tuple[str, ...] = ()
    calibrate: str = ""  # a hash of the tokens that weights were rounded with


class Manifest(msgspec.Struct, frozen=True):
    """`key` hashes the inputs listed in `key_inputs`; `digest` the content, `report` apart (a compile that took longer is the same artifact)."""

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
    entry_point: str  # what is asked of it: "forward" or "embed"
    embedding: Embedding | None  # of `embed`
    variants: tuple[str, ...]  # plans/<name>.json
    kernels: tuple[Kernel, ...]
    files: dict[str, str]  # every other file: relative path → SHA-256
    report: dict[str, Any]  # nodes before and after each pass, kernels by backend, seconds, gate by kernel
    report_digest: str  # so that a damaged report is noticed too

    @property
    def weight_bytes(self) -> int:
        """The size of weights.bin."""
        return max((w.offset + w.nbytes for w in self.weights if w.offset >= 0), default=0)


def kv_layout(states: tuple[State, ...]) -> str:
    """Identifies how KV pages lie in memory, so that pages can be exchanged only between equals: "page:N,K,page_size,E/1 bfloat16", or with scales."""
    caches = "/".join(sorted({s.dtype for s in states if "_cache_" in s.name}))
    scales = sorted({s.dtype for s in states if "_scale_" in s.name})
    return f"page:N,K,page_size,E/1 {caches}" + (f", scales N,K,page_size {scales[0]}" if scales else "")


def encode(manifest: Manifest) -> bytes:
    """The one spelling of a manifest: fields in order, dictionaries sorted, one space an indent."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n"


def seal(manifest: Manifest) -> Manifest:
    """The manifest with its `digest` and `report_digest` computed."""
    content = msgspec.structs.replace(manifest, digest="", report={}, report_digest="")
    report = msgspec.json.encode(manifest.report, order="deterministic")
    return msgspec.structs.replace(manifest, digest=hashlib.sha256(encode(content)).hexdigest(), report_digest=hashlib.sha256(report).hexdigest())


def decode(data: bytes, path: Path) -> Manifest:
    """Read a manifest that came from `path`. ArtifactError: truncated, foreign, of another version, or changed since it was written."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).schema_version
        if version > SCHEMA_VERSION:
            raise ArtifactError(f"{path}: format {version} is newer than this Ingot's {SCHEMA_VERSION}; upgrade Ingot, or compile the model again")
        if version < SCHEMA_VERSION:
            raise ArtifactError(f"{path}: format {version} is older than this Ingot's {SCHEMA_VERSION}; compile the model again")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path}: truncated, or not a manifest of Ingot ({error}); {AGAIN}") from error
    # Comparing bytes finds what a digest over decoded fields cannot: a field that decoding ignores, a changed space.
    if seal(manifest) != manifest or encode(manifest) != data:
        raise ArtifactError(f"{path}: changed since it was written (its digest differs); {AGAIN}")
    check_key(manifest.key)
    for relative in (*manifest.files, *(f"plans/{v}.json" for v in manifest.variants), *(f for k in manifest.kernels for f in (k.file, k.source))):
        check_relative(relative, path)
        if relative not in manifest.files:
            raise ArtifactError(f"{path}: speaks of {relative}, which is not among its files; {AGAIN}")
    return manifest


class _Versioned(msgspec.Struct):
    schema_version: int


def check_key(key: str) -> None:
    """ArtifactError unless `key` can name a folder: letters, digits, - and _."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", key):
        raise ArtifactError(f"{key!r} is not the key of an artifact: a key has letters, digits, - and _ (see `ingot artifacts list`)")
