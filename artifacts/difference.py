"""Why two artifacts are two: their keys' inputs, compared one by one and spelled out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .artifact import Artifact
from .manifest import CHUNK_BYTES, Manifest

INPUTS = "inputs.json"
"""At length what `key_inputs` has as hashes: `ingot.compiler.inputs` writes it."""


def differences(a: Artifact, b: Artifact) -> dict[str, list[str]]:
    """By input of the key, what differs, a line each ("max_num_seqs: 4 → 8"). For equal keys, which files of the content differ."""
    ours, theirs = a.manifest, b.manifest
    if ours.key == theirs.key:
        return {} if ours.digest == theirs.digest else {"content": list(_content(ours, theirs))}
    both = {n: (ours.key_inputs.get(n, ""), theirs.key_inputs.get(n, "")) for n in ours.key_inputs | theirs.key_inputs}
    return {name: list(_explained(name, a, b)) or [_changed(*values)] for name, values in both.items() if values[0] != values[1]}


def _explained(name: str, a: Artifact, b: Artifact) -> Iterator[str]:
    """What can be said beyond the two short values."""
    ours, theirs = a.manifest, b.manifest
    match name:
        case "options":
            yield from _fields(json.loads(ours.key_inputs[name]), json.loads(theirs.key_inputs[name]))
        case "config":
            yield from _fields(a.decode("config.json", dict), b.decode("config.json", dict))
        case "generation_config" | "compiler":
            yield from _fields(a.decode(INPUTS, dict).get(name, {}), b.decode(INPUTS, dict).get(name, {}))
        case "tokenizer":
            yield from _fields(_hashes(ours, "tokenizer/"), _hashes(theirs, "tokenizer/"))
        case "checkpoint":
            yield from _weights(ours, theirs)


def _fields(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            yield f"{prefix}{name}: {'only in the second' if name in b else 'only in the first'}, {json.dumps(b.get(name, a.get(name)))}"
        elif isinstance(a[name], dict) and isinstance(b[name], dict):
            yield from _fields(a[name], b[name], f"{prefix}{name}.")
        elif a[name] != b[name]:
            yield f"{prefix}{name}: {_changed(json.dumps(a[name]), json.dumps(b[name]))}"


def _changed(a: str, b: str) -> str:
    return f"{a or 'nothing'} → {b or 'nothing'}"


def _weights(a: Manifest, b: Manifest) -> Iterator[str]:
    """Weights that differ in kind; of equal kinds, those that lie in chunks whose bytes differ."""
    ours, theirs = _kinds(a), _kinds(b)
    yield from _fields(ours, theirs)
    if ours == theirs:
        chunks = [i for i, (x, y) in enumerate(zip(a.weight_chunks, b.weight_chunks, strict=False)) if x != y]
        inside = [w.name for w in a.weights if any(w.offset < (i + 1) * CHUNK_BYTES and w.offset + w.nbytes > i * CHUNK_BYTES for i in chunks if w.nbytes)]
        yield f"values of some of {len(inside)} weights: {', '.join(inside[:8])}{' …' if len(inside) > 8 else ''}"


def _kinds(manifest: Manifest) -> dict[str, str]:
    return {w.name: f"{w.dtype} {list(w.shape)}" + (", from a seed" if w.offset < 0 else "") for w in manifest.weights}


def _content(a: Manifest, b: Manifest) -> Iterator[str]:
    yield from _fields(_hashes(a), _hashes(b))
    if a.weight_chunks != b.weight_chunks:
        yield from _weights(a, b)


def _hashes(manifest: Manifest, folder: str = "") -> dict[str, str]:
    return {file: sha[:16] for file, sha in manifest.files.items() if file.startswith(folder)}
