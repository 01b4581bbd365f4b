"""The store: artifacts by key, and blobs that they share, under one folder.

    artifacts/<key>/   finished artifacts, which appear by one rename and never change
    artifacts/<key>.gate.json  what a deferred gate found later
    blobs/<sha256>     files of artifacts by content, shared as hard links: a blob with one link is used by nobody
    kernels/<name>.json  the blobs of a compiled kernel, so that a recompile skips its compilation
    building/<key>/    where a compiler works; a leftover of a killed one, unless its lock is held
    locks/<key>.lock   held by a compiler of that key; Linux frees it when the process dies
    lock               held for moments, around changes to blobs and kernels

Within one store everything is on one file system, and equal files are one. Across file systems there are no hard
links: `copy_out` then copies, and nothing is shared with that copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from . import archive
from .artifact import Artifact, ArtifactWriter
from .chunks import check_chunks, map_file
from .files import ArtifactError, flush, link, writing
from .gate_record import path_of as gate_record_path
from .manifest import MANIFEST, WEIGHTS, Manifest, check_key
from .settings import settings

_SPARE = ".new"
"""What becomes a blob or an index by a rename, under the blobs' lock."""


class Listed(msgspec.Struct, frozen=True):
    """An artifact of the store. One that is damaged has a `problem` in place of a manifest."""

    key: str
    path: Path
    nbytes: int
    manifest: Manifest | None
    problem: str = ""


class Collected(msgspec.Struct, frozen=True):
    """What `gc` removed."""

    folders: int  # of compilers that were killed
    blobs: int
    nbytes: int


class _CachedKernel(msgspec.Struct, frozen=True):
    binary: str  # SHA-256
    source: str


class Store:
    """The store under `home` (`settings().home`). Reading it needs no permission to write."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._artifacts, self._blobs, self._kernels = home / "artifacts", home / "blobs", home / "kernels"
        self._building, self._locks = home / "building", home / "locks"

    def find(self, key: str) -> Path | None:
        """The folder of the artifact with this key, or whose key alone begins with these eight or more characters. ArtifactError: several do."""
        check_key(key)
        if (self._artifacts / key).is_dir():
            return self._artifacts / key
        found = [k for k in self._keys() if k.startswith(key)] if len(key) >= 8 else []
        if len(found) > 1:
            raise ArtifactError(f"{key} begins the keys of {len(found)} artifacts: {', '.join(found)}; give more of it")
        return self._artifacts / found[0] if found else None

    def open(self, key_or_path: str | os.PathLike[str]) -> Artifact:
        """The artifact in a folder, or of a key. ArtifactError when there is none, or it is damaged."""
        if (Path(key_or_path) / MANIFEST).is_file():
            return Artifact.open(key_or_path)
        found = self.find(str(key_or_path)) if len(Path(key_or_path).parts) == 1 else None
        if found is None:
            raise ArtifactError(f"{key_or_path} is neither the folder of an artifact nor the key of one in {self.home} (see `ingot artifacts list`)")
        return Artifact.open(found)

    def list(self) -> tuple[Listed, ...]:
        """Every artifact, checked but for its weights."""
        return tuple(self._listed(key) for key in self._keys())

    @contextmanager
    def building(self, key: str, waiting: Callable[[], None] | None = None) -> Iterator[ArtifactWriter | None]:
        """Build the artifact `key`, alone: `with store.building(key) as writer`.

        While another process builds it, calls `waiting` once and waits. Gives None when the artifact is there by then;
        else a writer, whose artifact appears in the store when the block ends, `finish` having been called. On an error
        nothing of it remains. ArtifactError: the disk is full, or the store cannot be written.
        """
        with self._lock(key, waiting):
            final, folder = self._artifacts / key, self._building / key
            if final.exists():
                yield None
                return
            with writing(folder):
                _remove(folder)
                folder.mkdir(parents=True)
            writer = ArtifactWriter(folder)
            try:
                yield writer
                self._publish(key, folder, writer.manifest)
            finally:
                writer.abort()
                _remove(folder)

    def kernel(self, name: str) -> tuple[bytes, str] | None:
        """A compiled kernel's binary and source text; None when it was never kept, was collected, or is damaged."""
        cached = self._cached(name)
        if cached is None:
            return None
        binary, source = self._blob(cached.binary), self._blob(cached.source)
        return None if binary is None or source is None else (binary, source.decode())

    def keep_kernel(self, name: str, binary: bytes, source: str) -> None:
        """Keep a compiled kernel for `kernel(name)` at least until the next `gc`, longer when an artifact uses it."""
        with self._lock_blobs():
            shas = []
            for data in (binary, source.encode()):
                shas.append(sha := hashlib.sha256(data).hexdigest())
                if self._blob(sha) is None:
                    self._put(self._blobs / sha, data)
            self._index(name, *shas)

    def remove(self, key: str) -> None:
        """Remove an artifact; blobs that nothing else uses go at the next `gc`."""
        found = self.find(key)
        if found is None:
            raise ArtifactError(f"{self.home} has no artifact {key} (see `ingot artifacts list`)")
        with self._lock(found.name), writing(found):
            leftover = self._building / found.name
            _remove(leftover)
            leftover.parent.mkdir(parents=True, exist_ok=True)
            os.rename(found, leftover)  # so that a kill leaves an artifact, or none, never half of one
            _remove(leftover)
            gate_record_path(found).unlink(missing_ok=True)

    def gc(self) -> Collected:
        """Remove what killed compilers left, and blobs and cached kernels that no artifact uses. Running compilers are left alone."""
        folders = blobs = nbytes = 0
        for folder in sorted(self._building.glob("*")):
            with self._lock(folder.name, wait=False) as held, writing(folder):
                if held and folder.exists():
                    nbytes += sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.stat().st_nlink == 1)
                    folders += 1
                    _remove(folder)
        if not self._blobs.exists():
            return Collected(folders, blobs, nbytes)
        with self._lock_blobs():
            for spare in (self._blobs / _SPARE, self._kernels / _SPARE):
                spare.unlink(missing_ok=True)  # of a killed process; as a second link it would keep a blob for ever
            for blob in self._blobs.iterdir():
                if (stat := blob.stat()).st_nlink == 1:
                    blobs += 1
                    nbytes += stat.st_size
                    blob.unlink()
            for record in self._artifacts.glob("*.gate.json"):
                if not (self._artifacts / record.name.removesuffix(".gate.json")).exists():
                    record.unlink()
            for index in self._kernels.glob("*.json"):
                cached = self._cached(index.stem)
                if cached is None or not ((self._blobs / cached.binary).exists() and (self._blobs / cached.source).exists()):
                    index.unlink()
        return Collected(folders, blobs, nbytes)

    def same_weights(self, checkpoint: str, weights: dict[str, tuple[str, tuple[int, ...], object]]) -> Artifact | None:
        """An artifact of the same checkpoint (`key_inputs["checkpoint"]`) with these weights: name → (dtype, shape, recipe as JSON).

        `ArtifactWriter.reuse_weights` links them, so that a retune neither packs nor writes any.
        """
        for listed in self.list():
            manifest = listed.manifest
            if manifest is None or manifest.key_inputs.get("checkpoint") != checkpoint:
                continue
            if {w.name: (w.dtype, w.shape, w.recipe) for w in manifest.weights} == weights:
                return Artifact(listed.path, manifest)
        return None

    def copy_out(self, key: str, folder: Path) -> None:
        """Put an artifact at `folder`, which must be empty, absent, or the same artifact: hard links, copies across file systems."""
        artifact = self.open(key)
        check_output(folder, key)
        if (folder / MANIFEST).is_file() and Artifact.open(folder).manifest == artifact.manifest:
            return
        if (folder / MANIFEST).is_file():
            raise ArtifactError(f"{folder} has another artifact of the same key; name another folder, or delete it")
        partial = folder.absolute().with_name(f".{folder.name}.partial")
        with writing(folder):
            _remove(partial)
            try:
                for relative in artifact.relative_paths():
                    (partial / relative).parent.mkdir(parents=True, exist_ok=True)
                    link(artifact.path(relative), partial / relative)
                os.rename(partial, folder)
            finally:
                _remove(partial)

    def export(self, key_or_path: str | os.PathLike[str], file: Path) -> None:
        """Write an artifact, checked, as a plain tar that `import_` reads."""
        artifact = self.open(key_or_path)
        artifact.verify()
        archive.write(artifact, file)

    def import_(self, file: Path) -> Path:
        """Take in an artifact that `export` wrote; its folder in the store. ArtifactError: the archive is damaged or no artifact's."""
        key = archive.key_of(file)
        with self._lock(key):
            final, folder = self._artifacts / key, self._building / key
            if final.exists():
                return final
            try:
                with writing(folder):
                    _remove(folder)
                    folder.mkdir(parents=True)
                    archive.extract(file, folder)
                artifact = Artifact.open(folder)
                artifact.verify()
                self._publish(key, folder, artifact.manifest)
            finally:
                _remove(folder)
        return final

    def _keys(self) -> tuple[str, ...]:
        return tuple(sorted(p.name for p in self._artifacts.glob("*") if p.is_dir()))

    def _listed(self, key: str) -> Listed:
        path = self._artifacts / key
        nbytes = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        try:
            return Listed(key, path, nbytes, Artifact.open(path).manifest)
        except ArtifactError as error:
            return Listed(key, path, nbytes, None, str(error))

    def _publish(self, key: str, folder: Path, manifest: Manifest | None) -> None:
        """Share the files of a finished folder with equal blobs and rename it into place."""
        if manifest is None:
            raise ArtifactError(f"{folder}: the artifact was never finished; call ArtifactWriter.finish")
        if manifest.key != key:
            raise ArtifactError(f"{folder}: the artifact's key is {manifest.key}, and {key} is being built")
        with self._lock_blobs(), writing(folder):
            for relative, sha in manifest.files.items():
                self._share(folder / relative, self._blobs / sha, lambda blob: self._blob(blob.name) is not None)
            if manifest.weight_chunks:
                # Hashing the chunks' hashes spares a second pass over the bytes.
                sha = hashlib.sha256("\n".join(manifest.weight_chunks).encode()).hexdigest()
                self._share(folder / WEIGHTS, self._blobs / sha, lambda blob: _intact(blob, manifest.weight_chunks))
            for kernel in manifest.kernels:
                self._index(kernel.name, manifest.files[kernel.file], manifest.files[kernel.source])
            self._artifacts.mkdir(exist_ok=True)
            os.rename(folder, self._artifacts / key)
            flush(self._artifacts)

    def _share(self, file: Path, blob: Path, intact: Callable[[Path], bool]) -> None:
        """Make `file`, which is good, and its blob one. A blob that was damaged is replaced, so that compiling again mends the store."""
        if blob.exists() and blob.samefile(file):
            return
        good = blob.exists() and blob.stat().st_size == file.stat().st_size and intact(blob)
        source, destination = (blob, file) if good else (file, blob)
        spare = self._blobs / _SPARE
        spare.unlink(missing_ok=True)
        os.link(source, spare)
        os.replace(spare, destination)

    def _blob(self, sha: str) -> bytes | None:
        try:
            data = (self._blobs / sha).read_bytes()
        except FileNotFoundError:  # never kept, or collected this moment
            return None
        return data if hashlib.sha256(data).hexdigest() == sha else None

    def _cached(self, name: str) -> _CachedKernel | None:
        try:
            return msgspec.json.decode((self._kernels / f"{name}.json").read_bytes(), type=_CachedKernel)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _index(self, name: str, binary: str, source: str) -> None:
        self._put(self._kernels / f"{name}.json", msgspec.json.encode(_CachedKernel(binary, source)))

    def _put(self, path: Path, data: bytes) -> None:
        """Write a file so that it is there whole or not at all. One at a time, under the blobs' lock: a leftover is overwritten."""
        spare = path.with_name(_SPARE)
        spare.unlink(missing_ok=True)
        spare.write_bytes(data)
        spare.chmod(0o444)
        os.replace(spare, path)

    @contextmanager
    def _lock_blobs(self) -> Iterator[None]:
        with writing(self.home):
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._kernels.mkdir(exist_ok=True)
            with open(self.home / "lock", "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield

    @contextmanager
    def _lock(self, key: str, waiting: Callable[[], None] | None = None, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a key; gives False when `wait` is false and another process holds it."""
        check_key(key)
        path = self._locks / f"{key}.lock"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")  # noqa: SIM115 (closed below, which frees the lock)
        try:
            held = _try_lock(file.fileno())
            if not held and wait:
                if waiting is not None:
                    waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
                held = True
            yield held
        finally:
            file.close()


def check_output(folder: Path, key: str) -> None:
    """ArtifactError unless an artifact with this key can be put at `folder`: nothing is there, or an artifact with this key."""
    if (folder / MANIFEST).is_file() and Artifact.open(folder).manifest.key == key:
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} is there already and is not this artifact; name another folder, or delete it")


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _intact(blob: Path, chunks: tuple[str, ...]) -> bool:
    try:
        check_chunks(blob, map_file(blob), chunks, settings().num_threads)
    except ArtifactError:
        return False
    return True
