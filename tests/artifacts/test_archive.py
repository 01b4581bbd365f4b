from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.files import ArtifactError
from ingot.artifacts.store import Store

Build = Callable[..., Path]


@pytest.fixture
def exported(store: Store, build: Build, tmp_path: Path) -> Path:
    build("k1")
    store.export("k1", tmp_path / "k1.tar")
    return tmp_path / "k1.tar"


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other")


def check_untouched(store: Store) -> None:
    assert store.list() == ()
    assert list((store.home / "building").glob("*")) == []


def test_round_trip(store: Store, exported: Path, other: Store) -> None:
    folder = other.import_(exported)
    assert folder == other.find("k1")
    assert Artifact.open(folder).manifest == store.open("k1").manifest
    Artifact.open(folder).verify()
    assert other.import_(exported) == folder
    assert other.kernel("gemv_2c3d") == store.kernel("gemv_2c3d")
    with tarfile.open(exported) as tar:
        assert {m.name.partition("/")[0] for m in tar} == {"k1"}


def test_the_same_artifact_gives_the_same_archive(store: Store, exported: Path, tmp_path: Path) -> None:
    store.copy_out("k1", tmp_path / "out")
    store.export(tmp_path / "out", tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == exported.read_bytes()
    assert sorted(p.name for p in tmp_path.glob("*tar*")) == ["again.tar", "k1.tar"]


def test_a_damaged_artifact_is_not_exported(store: Store, build: Build, tmp_path: Path, flip: Callable[..., None]) -> None:
    flip(build("k1") / "weights.bin", 1001)
    with pytest.raises(ArtifactError, match=r"weights\.bin"):
        store.export("k1", tmp_path / "k1.tar")
    assert not (tmp_path / "k1.tar").exists()


def test_a_truncated_archive_is_refused(exported: Path, other: Store, rng: random.Random) -> None:
    data = exported.read_bytes()
    end = Artifact.open(exported.parent / "home" / "artifacts" / "k1").manifest.weight_bytes
    for size in [0, 1, 511, 512, 600, *(rng.randrange(end) for _ in range(5))]:
        exported.write_bytes(data[:size])
        with pytest.raises(ArtifactError):
            other.import_(exported)
        check_untouched(other)


def test_a_flipped_byte_is_refused(exported: Path, other: Store, flip: Callable[..., None]) -> None:
    with tarfile.open(exported) as tar:
        offsets = {m.name: m.offset_data + m.size // 2 for m in tar if m.size}
    assert len(offsets) == 12
    for name, offset in offsets.items():
        flip(exported, offset, 2)
        with pytest.raises(ArtifactError, match=name.removeprefix("k1/")):
            other.import_(exported)
        flip(exported, offset, 2)
        check_untouched(other)
    flip(exported, 3, 0)  # of a header
    with pytest.raises(ArtifactError, match="truncated or not a tar"):
        other.import_(exported)
    check_untouched(other)


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"harm", link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    return info, data


MALICIOUS = {
    "absolute": member("/tmp/ingot-harm"),
    "parent": member("k1/../../harm"),
    "outside": member("harm"),
    "another folder": member("k2/harm"),
    "symbolic link": member("k1/link", tarfile.SYMTYPE, link="/etc"),
    "hard link": member("k1/link", tarfile.LNKTYPE, link="../../../etc/passwd"),
    "fifo": member("k1/pipe", tarfile.FIFOTYPE),
    "device": member("k1/null", tarfile.CHRTYPE),
    "folder": member("k1/folder", tarfile.DIRTYPE),
    "sparse": member("k1/sparse", tarfile.GNUTYPE_SPARSE),
    "twice": member("k1/manifest.json"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_archive_is_refused(name: str, store: Store, build: Build, other: Store, tmp_path: Path) -> None:
    root = build("k1")
    info, data = MALICIOUS[name]
    with tarfile.open(tmp_path / "bad.tar", "w:") as tar:
        tar.add(root / "manifest.json", "k1/manifest.json")
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ArtifactError, match="do not use this"):
        other.import_(tmp_path / "bad.tar")
    check_untouched(other)
    assert not Path("/tmp/ingot-harm").exists()
    assert list(tmp_path.rglob("harm")) == []


def test_surplus_files_do_not_travel(exported: Path, other: Store) -> None:
    with tarfile.open(exported, "a:") as tar:
        tar.addfile(*[member("k1/surplus")[0], io.BytesIO(b"harm")])
    with pytest.raises(ArtifactError, match="surplus"):
        other.import_(exported)
    check_untouched(other)


def test_a_foreign_archive_is_refused(exported: Path, other: Store, store: Store, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "foreign.tar", "w:") as tar:
        tar.add(__file__, "k1/test.py")
    with pytest.raises(ArtifactError, match=r"does not begin with manifest\.json"):
        other.import_(tmp_path / "foreign.tar")
    with tarfile.open(tmp_path / "renamed.tar", "w:") as tar:
        for relative in store.open("k1").relative_paths():
            tar.add(store.open("k1").path(relative), f"k2/{relative}")
    with pytest.raises(ArtifactError, match="key is k1, and k2 is being built"):
        other.import_(tmp_path / "renamed.tar")
    with pytest.raises(ArtifactError, match="is not a file"):
        other.import_(tmp_path / "absent.tar")
    check_untouched(other)
