"""What the key of an artifact hashes: in short in its manifest, at length in its `inputs.json`, so that two keys can be compared."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ingot.artifacts.manifest import Options
from ingot.models import encoders, sentence_transformers
from ingot.models.checkpoint import Checkpoint
from ingot.models.source import ModelSource
from ingot.ops.target import Target

from .codegen.tvm import c_compiler

_PACKAGES = {"torch": "torch", "transformers": "transformers", "triton": "triton", "apache-tvm": "tvm"}
_SOURCES = ("ops/**/*.py", "compiler/**/*.py", "compiler/**/*.c", "models/**/*.py", "artifacts/**/*.py")


@dataclass(frozen=True)
class Inputs:
    """`short`: a word or a hash for each input, which the key hashes; `long`: what is behind the hashes that no file of the artifact shows."""

    short: dict[str, str]
    long: dict[str, Any]

    @property
    def key(self) -> str:
        return sha256(json.dumps(self.short, sort_keys=True))


def inputs_of(source: ModelSource, checkpoint: Checkpoint | None, target: Target, options: Options, tuning: str) -> Inputs:
    """Everything that decides what comes out. `checkpoint` None: weights are drawn from seeds. `tuning`: the table that chooses kernels."""
    compiler = dict(_compiler(target))
    versions = [f"{n} {v}" for n, v in compiler.items() if n in _PACKAGES]
    short = {
        "model": source.name,
        "config": sha256(source.config.to_json_string()),
        "generation_config": sha256(json.dumps(source.generation_config, sort_keys=True)),
        "checkpoint": "seed 0" if checkpoint is None else checkpoint.fingerprint(),
        "tokenizer": sha256(b"".join(f.read_bytes() for f in sorted(source.tokenizer_files))),
        "target": str(target),
        "options": json.dumps(msgspec.to_builtins(options), sort_keys=True),
        "tuning": tuning,
        "compiler": f"{sha256(json.dumps(compiler))[:16]} {', '.join(versions)}",
    }
    if encoders.architecture(source.config) is not None:
        short["embedding"] = str(sentence_transformers.read(source.folder))
    return Inputs(short, {"generation_config": source.generation_config, "compiler": compiler})


def _compiler(target: Target) -> Iterator[tuple[str, str]]:
    """Versions of the libraries that trace and generate, and hashes of our own sources: all that could change the artifact."""
    for package, module in _PACKAGES.items():
        if importlib.util.find_spec(module) is not None:
            yield package, importlib.metadata.version(package)
    if target.kind == "cpu":
        yield "cc", c_compiler()
    root = Path(__file__).parent.parent
    for file in sorted(file for pattern in _SOURCES for file in root.glob(pattern)):
        yield file.relative_to(root).as_posix(), sha256(file.read_bytes())[:16]


def sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
