"""An artifact as one file: a plain, uncompressed tar (weights do not compress), all of whose members are files of one folder, `<key>/…`."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .artifact import Artifact
from .files import ArtifactError, check_relative, flush, writing
from .manifest import MANIFEST, check_key

_BUFFER_BYTES = 1 << 20


def write(artifact: Artifact, file: Path) -> None:
    """Write `file`, whole or not at all. The same artifact gives the same bytes. ArtifactError: the disk is full."""
    partial = file.with_name(f".{file.name}.partial")
    with writing(file):
        try:
            with tarfile.TarFile(partial, "w", copybufsize=_BUFFER_BYTES) as tar:
                for relative in artifact.relative_paths():
                    member = tarfile.TarInfo(f"{artifact.manifest.key}/{relative}")
                    member.size = artifact.path(relative).stat().st_size
                    with open(artifact.path(relative), "rb") as source:
                        tar.addfile(member, source)
            flush(partial)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)


def key_of(file: Path) -> str:
    """The key of the artifact in an archive. ArtifactError when it is not an archive of one."""
    with _reading(file) as tar:
        first = tar.next()
    key, _, relative = first.name.partition("/") if first is not None else ("", "", "")
    if relative != MANIFEST:
        raise ArtifactError(f"{file} is not an exported artifact: it does not begin with {MANIFEST}; make one with `ingot artifacts export`")
    check_key(key)
    return key


def extract(file: Path, folder: Path) -> None:
    """Unpack an archive's files into the empty `folder`; what they hold is for `Artifact.verify` to check.

    ArtifactError: a member is a link, a device or a sparse file, lies outside the folder or comes twice.
    """
    key = key_of(file)
    with _reading(file) as tar:
        for member in tar:
            # A sparse file can claim terabytes in a small archive; links can point anywhere.
            if not member.isfile() or member.issparse():
                raise ArtifactError(f"{file}: {member.name!r} is not a plain file; do not use this archive, and ask where it came from")
            relative = member.name.removeprefix(f"{key}/")
            check_relative(relative, file)
            target = folder / relative
            if relative == member.name or target.exists():
                raise ArtifactError(f"{file}: {member.name!r} is outside {key}/ or comes twice; do not use this archive, and ask where it came from")
            source = tar.extractfile(member)
            assert source is not None
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, open(target, "xb") as out:
                shutil.copyfileobj(source, out, _BUFFER_BYTES)
            target.chmod(0o444)
            flush(target)


@contextmanager
def _reading(file: Path) -> Iterator[tarfile.TarFile]:
    if not file.is_file():
        raise ArtifactError(f"{file} is not a file; give one that `ingot artifacts export` wrote")
    try:
        with tarfile.open(file, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise ArtifactError(f"{file} is truncated or not a tar ({error}); copy or export it again") from error
