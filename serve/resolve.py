"""MODEL_OR_ARTIFACT on a command line: which artifact is meant. A model not compiled yet is compiled, by a subprocess."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.files import read
from ingot.artifacts.gate_record import notice
from ingot.artifacts.manifest import MANIFEST, decode
from ingot.artifacts.settings import settings
from ingot.artifacts.store import Store
from ingot.ops import target

from .errors import ResolveError
from .flags import CompileFlags


def resolve(name: str, flags: CompileFlags) -> Path:
    """The artifact's folder: `name` itself, an artifact of the store by its key, or what `ingot compile NAME` makes.

    What was compiled before is found without importing the compiler, by a note whose name hashes everything that could
    have changed since. Raises ResolveError when compile flags are given with an artifact; SystemExit with the compiler's
    exit code when compilation failed, which has been explained on stderr by then. Says so when the gate of its kernels is missing.
    """
    path = _resolve(name, flags)
    if missing := notice(Artifact(path, decode(read(path / MANIFEST), path / MANIFEST))):
        print(f"ingot: {missing}", file=sys.stderr, flush=True)
    return path


def _resolve(name: str, flags: CompileFlags) -> Path:
    found = find_artifact(name)
    if found is not None:
        return _as_it_is(found, name, flags)
    note = _notes() / _fingerprint(name, flags)
    if (noted := _noted(note)) is not None:
        return noted
    path = _compile(name, flags)
    with contextlib.suppress(OSError):  # a store that cannot be written serves what it has; only the note is missing next time
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f".{note.name}.{os.getpid()}")
        partial.write_text(str(path))
        partial.replace(note)
    return path


def forget_removed() -> None:
    """Delete the notes whose artifacts are gone."""
    for note in _notes().glob("*"):
        if _noted(note) is None:
            note.unlink(missing_ok=True)


def _notes() -> Path:
    return settings().home / "resolved"


def _noted(note: Path) -> Path | None:
    """The artifact that a note names; None when there is no such note, or no such artifact any more."""
    path = Path(note.read_text()) if note.is_file() else None
    return path if path is not None and path.is_absolute() and (path / MANIFEST).is_file() else None


def find_artifact(name: str) -> Path | None:
    """The folder of the artifact that `name` is, or is the key of; None when it is neither."""
    if (Path(name) / "manifest.json").is_file():
        return Path(name)
    if Path(name).exists() or not re.fullmatch(r"[0-9a-f]{8,64}", name):
        return None
    return Store(settings().home).find(name)


def _as_it_is(path: Path, name: str, flags: CompileFlags) -> Path:
    if flags.given:
        raise ResolveError(f"{name} is an artifact, compiled already: {' '.join(flags.argv)} cannot change it; leave the flags out, or give the model")
    return path


def _compile(name: str, flags: CompileFlags) -> Path:
    print(f"looking for {name}, compiled for this machine; if there is none, compiling it now", file=sys.stderr, flush=True)
    command = [sys.executable, "-P", "-m", "ingot.serve.cli", "compile", name, *flags.argv, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # its progress bar and its errors go to our stderr
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return Path(json.loads(done.stdout)["path"])


def _fingerprint(name: str, flags: CompileFlags) -> str:
    """Hash of the checkpoint's files, the flags, the machine and the compiler; files by name, size and time of change."""
    facts = [name, *flags.argv, str(target.resolve(flags.target or "auto")), *_checkpoint(name), *_compiler()]
    facts += _stats(Path(f) for f in (flags.calibrate,) if f and Path(f).is_file())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _checkpoint(name: str) -> Iterator[str]:
    folder = _package("models") / "bundled" if name == "bundled" else Path(name)
    if name.endswith(".onnx"):  # its tokenizer and settings lie beside it or in the folder above
        here = folder.resolve().parent
        yield from _stats(f for place in (here, here.parent) for f in place.iterdir() if f.is_file())
    elif folder.is_dir():
        yield str(folder.resolve())
        yield from _stats(f for f in (*folder.iterdir(), *folder.glob("1_Pooling/*")) if f.is_file())
    else:
        from huggingface_hub.constants import HF_HUB_CACHE  # here: an artifact needs no hub

        revision = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / "main"
        yield revision.read_text() if revision.is_file() else "unknown"


def _compiler() -> Iterator[str]:
    for package in ("ops", "artifacts", "models", "compiler"):
        yield from _stats(_package(package).rglob("*.py"))
    yield from _stats((_package("artifacts") / "tuned").glob("*.json"))
    for distribution in ("ingot", "torch", "transformers", "triton", "apache-tvm"):
        yield from (f"{d.name} {d.version}" for d in importlib.metadata.distributions(name=distribution))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(f"ingot.{name}")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _stats(files: Iterator[Path]) -> Iterator[str]:
    for file in sorted(files):
        stat = file.stat()
        yield f"{file} {stat.st_size} {stat.st_mtime_ns}"
