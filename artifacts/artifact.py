"""An artifact: one folder, opened to be read or written once.

manifest.json      what it is, and the SHA-256 of everything else
plans/<name>.json  one per variant
checks.json        what the numeric gate compares
kernels/<name>.so or .cubin, with the generated source beside it
weights.bin        packed tensors at multiples of 4096 bytes, hashed by chunk
tokenizer/…, config.json, inputs.json
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ingot.ops.target import Target

from .chunks import Progress, check_chunks, map_file
from .files import AGAIN, ArtifactError, check_relative, flush, link, read, writing
from .manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    WEIGHTS,
    Embedding,
    Group,
    Manifest,
    ModelInfo,
    Options,
    State,
    WeightTensor,
    check_key,
    decode,
    encode,
    kv_layout,
    seal,
)
from .plan import Kernel, Variant
from .settings import settings

if TYPE_CHECKING:
    from .weights import WeightsWriter

_T = TypeVar("_T")


@dataclass(frozen=True)
class Artifact:
    """A folder whose every file but weights.bin has been checked; `ingot.artifacts.weights.load` checks that one as it reads."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Artifact:
        """Read the manifest and check every file against it. ArtifactError names the file that is missing, truncated or damaged."""
        root = Path(path).absolute()
        if not (root / MANIFEST).is_file():
            raise ArtifactError(f"{root} is not an artifact: it has no {MANIFEST}; give a folder that `ingot compile -o` wrote; if this was one, {AGAIN}")
        artifact = cls(root, decode(read(root / MANIFEST), root / MANIFEST))
        for relative in artifact.manifest.files:
            artifact.read(relative)
        artifact._check_size_of_weights()
        return artifact

    def path(self, relative: str) -> Path:
        """The absolute path of a file of the manifest, or of weights.bin. ArtifactError when there is none."""
        if relative not in self.manifest.files and relative not in (MANIFEST, WEIGHTS):
            raise ArtifactError(f"{self.root} has no file {relative}; it has {', '.join(self.manifest.files)}")
        return self.root / relative

    def relative_paths(self) -> list[str]:
        """Every file, the manifest first and the weights last."""
        return [MANIFEST, *self.manifest.files, *([WEIGHTS] if self.manifest.weight_chunks else [])]

    def read(self, relative: str) -> bytes:
        """A file's bytes, checked. ArtifactError when they are not those that were written."""
        data = read(self.path(relative))
        if hashlib.sha256(data).hexdigest() != self.manifest.files[relative]:
            raise ArtifactError(f"{self.root / relative} is not what was written (SHA-256 differs); {AGAIN}")
        return data

    def plan(self, name: str) -> Variant:
        """The plan of a variant that the manifest lists."""
        if name not in self.manifest.variants:
            raise ArtifactError(f"{self.root} has no variant {name}; it has {', '.join(self.manifest.variants)}")
        return self.decode(f"plans/{name}.json", Variant)

    def decode(self, relative: str, type: type[_T]) -> _T:
        """A JSON file as `type`. ArtifactError when it is damaged, or says something else."""
        try:
            return msgspec.json.decode(self.read(relative), type=type)
        except msgspec.DecodeError as error:
            raise ArtifactError(f"{self.root / relative} is not what this Ingot writes there ({error}); compile the model again") from error

    def verify(self, threads: int | None = None, progress: Progress | None = None) -> None:
        """Check everything again, weights included. ArtifactError names the damaged or surplus file."""
        Artifact.open(self.root)
        surplus = {p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if not p.is_dir()} - set(self.relative_paths())
        if surplus:
            raise ArtifactError(f"{self.root} holds files that are not the artifact's: {', '.join(sorted(surplus))}; delete them")
        if self.manifest.weight_chunks:
            memory = map_file(self.root / WEIGHTS)
            check_chunks(self.root / WEIGHTS, memory, self.manifest.weight_chunks, threads or settings().num_threads, progress)

    def _check_size_of_weights(self) -> None:
        expected = self.manifest.weight_bytes
        if not expected:
            return
        file = self.root / WEIGHTS
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; {AGAIN}")
        if (actual := file.stat().st_size) != expected:
            raise ArtifactError(f"{file} has {actual} bytes instead of {expected}; {AGAIN}")


class ArtifactWriter:
    """Writes an artifact into an empty folder, which is one once `finish` has returned. ArtifactError when the disk is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest | None = None
        self._files: dict[str, str] = {}
        self._kernels: list[Kernel] = []
        self._variants: list[str] = []
        self._writer: WeightsWriter | None = None
        self._weights: tuple[tuple[WeightTensor, ...], tuple[str, ...]] = ((), ())

    def add_file(self, relative: str, data: bytes) -> None:
        """Write a file at `relative` ("tokenizer/tokenizer.json"). ArtifactError when it is there already."""
        check_relative(relative, self.folder)
        if relative in self._files or relative in (MANIFEST, WEIGHTS):
            raise ArtifactError(f"{self.folder}: {relative} is written twice")
        self._write(relative, data)
        self._files[relative] = hashlib.sha256(data).hexdigest()

    def add_plan(self, variant: Variant) -> None:
        """Write a variant's plan."""
        self.add_file(f"plans/{variant.name}.json", msgspec.json.format(msgspec.json.encode(variant), indent=1))
        self._variants.append(variant.name)

    def add_kernel(self, kernel: Kernel, binary: bytes, source: str) -> None:
        """Write a compiled kernel at `kernel.file` and the text that it came from at `kernel.source`."""
        self.add_file(kernel.file, binary)
        self.add_file(kernel.source, source.encode())
        self._kernels.append(kernel)

    def weights(self) -> WeightsWriter:
        """The writer of weights.bin; the same at each call."""
        from .weights import WeightsWriter  # needs torch

        if self._writer is None:
            self._writer = WeightsWriter(self.folder / WEIGHTS, settings().num_threads)
        return self._writer

    def reuse_weights(self, other: Artifact) -> None:
        """Take the weights of another artifact, checked, instead of writing them: a hard link, or a copy across file systems."""
        if self._writer is not None:
            raise ArtifactError(f"{self.folder}: {WEIGHTS} is written twice")
        other.verify()
        if other.manifest.weight_chunks:
            link(other.path(WEIGHTS), self.folder / WEIGHTS)
        self._weights = (other.manifest.weights, other.manifest.weight_chunks)

    def finish(self, *, key: str, key_inputs: dict[str, str], target: Target, model: ModelInfo, options: Options,
               groups: tuple[Group, ...], states: tuple[State, ...], report: dict[str, Any], entry_point: str = "forward",
               embedding: Embedding | None = None) -> Manifest:  # fmt: skip
        """Write the manifest, whose other fields come from what was added, and flush everything to the disk."""
        check_key(key)
        if self._writer is not None:
            self._weights = self._writer.close()
        tensors, chunks = self._weights
        manifest = seal(Manifest(
            schema_version=SCHEMA_VERSION, ingot_version=version("ingot"), key=key, digest="", key_inputs=key_inputs, target=target, model=model,
            options=options, kv_layout=kv_layout(states), groups=groups, states=states, weights=tensors, weight_chunks=chunks,
            entry_point=entry_point, embedding=embedding, variants=tuple(self._variants), kernels=tuple(self._kernels), files=self._files,
            report=report, report_digest="",
        ))  # fmt: skip
        data = encode(manifest)
        self._write(MANIFEST, data)
        folders = [self.folder, *(p for p in self.folder.rglob("*") if p.is_dir())]
        files = [self.folder / f for f in (*self._files, MANIFEST)]
        with writing(self.folder), ThreadPoolExecutor(8) as pool:
            for path in (*files, self.folder / WEIGHTS):
                if path.exists():
                    path.chmod(0o444)
            # Side by side, because a journal commits many flushes at the price of one.
            list(pool.map(flush, files))
            list(pool.map(flush, folders))
        self.manifest = decode(data, self.folder / MANIFEST)
        return self.manifest

    def abort(self) -> None:
        """Let go of threads and files; the folder stays for the caller to remove."""
        if self._writer is not None:
            self._writer.abort()

    def _write(self, relative: str, data: bytes) -> None:
        path = self.folder / relative
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
