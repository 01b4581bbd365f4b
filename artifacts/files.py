"""Files of an artifact: errors that say what to do, safe paths, links and flushes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ingot.ops.errors import IngotError

AGAIN = "delete the artifact and compile or import it again"


class ArtifactError(IngotError):
    """An artifact cannot be read or written; the message names the file and says what to do."""


def check_relative(relative: str, place: Path) -> None:
    """ArtifactError unless `relative` is the plain path of a file inside an artifact; `place` is what speaks of it."""
    parts = PurePosixPath(relative).parts
    if not parts or "/".join(parts) != relative or relative.startswith("/") or ".." in parts or "\0" in relative:
        raise ArtifactError(f"{place}: {relative!r} is not a path inside an artifact; do not use this file, and ask where it came from")


_SPACE = "free some space (`ingot artifacts gc`), or write to another disk (INGOT_HOME is where the store is)"
_PERMISSION = "write to a folder of your own (INGOT_HOME is where the store is), or ask for permission"
_LIMIT = "raise the limit on the size of files (ulimit -f), or write to a file system that takes larger ones"
_PLACE = "name a path that can be a file or folder"
_REMEDIES = {
    errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.EFBIG: _LIMIT,
    errno.EROFS: _PERMISSION, errno.EACCES: _PERMISSION, errno.EPERM: _PERMISSION,
    errno.ENOENT: _PLACE, errno.ENOTDIR: _PLACE, errno.EISDIR: _PLACE,
}  # fmt: skip


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around writing files: a full disk, a read-only file system or a forbidden folder becomes an ArtifactError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise ArtifactError(f"cannot write {error.filename or place}: {error.strerror}; {_REMEDIES[error.errno]}") from error


def read(path: Path) -> bytes:
    """A file's bytes; ArtifactError when it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ArtifactError(f"{path} is missing; {AGAIN}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; check the disk and the permissions") from error


def link(source: Path, destination: Path) -> None:
    """A hard link, so that equal files take their space once; a copy when the two are on different file systems."""
    with writing(destination):
        try:
            os.link(source, destination)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copyfile(source, destination)
            destination.chmod(0o444)


def flush(path: Path) -> None:
    """fsync a file or folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
