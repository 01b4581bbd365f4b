from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ingot.artifacts.artifact import Artifact, ArtifactWriter
from ingot.artifacts.files import ArtifactError
from ingot.artifacts.store import Collected, Store
from ingot.artifacts.weights import load

Build = Callable[..., Path]
NOTHING = Collected(0, 0, 0)


def check_integrity(store: Store) -> None:
    """What is listed is whole, nothing lies about after a gc, and every blob is used."""
    store.gc()
    for listed in store.list():
        assert listed.problem == ""
        Artifact.open(listed.path).verify()
    assert list((store.home / "building").glob("*")) == []
    assert [b for b in (store.home / "blobs").glob("*") if b.stat().st_nlink == 1] == []


def test_build_find_list_remove(store: Store, build: Build) -> None:
    assert store.find("0123456789abcdef") is None
    assert store.list() == ()
    folder = build("0123456789abcdef")
    assert store.find("0123456789abcdef") == store.find("01234567") == folder
    assert store.find("0123456") is None  # too short to be meant as one
    build("0123456789ffffff")
    with pytest.raises(ArtifactError, match="begins the keys of 2 artifacts"):
        store.find("0123456789")
    assert store.open("0123456789abcdef").manifest == store.open(folder).manifest
    assert [entry.key for entry in store.list()] == ["0123456789abcdef", "0123456789ffffff"]
    assert store.list()[0].nbytes == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    store.remove("0123456789abcdef")
    assert [entry.key for entry in store.list()] == ["0123456789ffffff"]
    for missing in ("0123456789abcdef", "nothing", "../x", ""):
        with pytest.raises(ArtifactError):
            store.open(missing)
    with pytest.raises(ArtifactError, match="has no artifact 0123456789abcdef"):
        store.remove("0123456789abcdef")
    check_integrity(store)


def test_what_is_there_is_not_built_again(store: Store, build: Build) -> None:
    build("k1")
    with store.building("k1") as writer:
        assert writer is None


def test_a_damaged_artifact_is_listed_with_its_problem(store: Store, build: Build, flip: Callable[..., None]) -> None:
    build("good", seed=1)
    flip(build("bad") / "kernels" / "gemv_2c3d.so", 3)
    bad, good = store.list()
    assert "kernels/gemv_2c3d.so is not what was written" in bad.problem
    assert (bad.manifest, good.problem) == (None, "")
    (store.home / "artifacts" / "bad" / "manifest.json").unlink()
    assert "no manifest.json" in store.list()[0].problem
    store.remove("bad")
    check_integrity(store)


def test_an_error_leaves_nothing(store: Store, builder: SimpleNamespace) -> None:
    def fail() -> None:
        with store.building("k1") as writer:
            builder.write(writer, "k1")
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        fail()
    with pytest.raises(ArtifactError, match="never finished"), store.building("k1"):
        pass
    with pytest.raises(ArtifactError, match="key is other, and k1 is being built"), store.building("k1") as writer:
        builder.write(writer, "other")
    assert store.find("k1") is None
    check_integrity(store)


def test_equal_files_are_stored_once(store: Store, build: Build) -> None:
    one, two, three = build("k1"), build("k2", max_model_len=778), build("k3", seed=5)
    for name in ("weights.bin", "kernels/gemv_2c3d.so"):
        assert (one / name).samefile(two / name)
        assert not (one / name).samefile(three / name)
    assert (one / "config.json").samefile(three / "config.json")
    assert load(Artifact.open(three), "cpu")["fp32"].shape == (17, 19)


def test_gc_keeps_what_is_used(store: Store, build: Build) -> None:
    build("k1")
    build("k2", max_model_len=778)
    build("k3", seed=5)
    assert store.gc() == NOTHING
    store.remove("k1")
    assert store.gc() == NOTHING
    size = (store.home / "artifacts" / "k3" / "weights.bin").stat().st_size
    store.remove("k3")
    collected = store.gc()
    assert collected.nbytes > size
    assert collected.blobs == 1 + 3  # weights and the kernels' binaries; plans, sources and texts are as in k2
    Artifact.open(store.home / "artifacts" / "k2").verify()
    store.remove("k2")
    store.gc()
    assert list((store.home / "blobs").iterdir()) == list((store.home / "kernels").iterdir()) == []


def test_gc_removes_the_spare_link_of_a_killed_process_and_the_record_of_a_removed_artifact(store: Store, build: Build) -> None:
    folder = build("k1")
    os.link(folder / "weights.bin", store.home / "blobs" / ".new")
    (store.home / "artifacts" / "k1.gate.json").write_text("{}")
    (store.home / "artifacts" / "k2.gate.json").write_text("{}")
    store.gc()
    assert sorted(p.name for p in (store.home / "artifacts").iterdir()) == ["k1", "k1.gate.json"]
    store.remove("k1")
    store.gc()
    assert list((store.home / "blobs").iterdir()) == list((store.home / "artifacts").iterdir()) == []


def test_compiled_kernels_are_kept(store: Store, build: Build, flip: Callable[..., None]) -> None:
    assert store.kernel("gemv_2c3d") is None
    folder = build("k1")
    assert store.kernel("gemv_2c3d") == ((folder / "kernels/gemv_2c3d.so").read_bytes(), "# gemv_2c3d α\n")
    store.keep_kernel("tried_1", b"\x7fELF", "def tried(): ...\n")
    assert store.kernel("tried_1") == (b"\x7fELF", "def tried(): ...\n")
    assert store.gc().blobs == 2
    assert store.kernel("tried_1") is None
    flip(folder / "kernels/gemv_2c3d.so", 17)
    assert store.kernel("gemv_2c3d") is None
    (store.home / "kernels" / "rope_4e5f.json").write_bytes(b'{"binary"')
    assert store.kernel("rope_4e5f") is None
    store.keep_kernel("rope_4e5f", b"\x7fELF", "")
    assert store.kernel("rope_4e5f") == (b"\x7fELF", "")


@pytest.mark.parametrize("name", ["weights.bin", "kernels/gemv_2c3d.so"])
def test_building_again_mends_a_damaged_blob(store: Store, build: Build, name: str, flip: Callable[..., None]) -> None:
    folder = build("k1")
    build("k2", max_model_len=778)
    flip(folder / name, 77)
    store.remove("k1")
    Artifact.open(build("k1")).verify()
    with pytest.raises(ArtifactError, match=name):
        store.open("k2").verify()
    store.remove("k2")
    assert (build("k2", max_model_len=778) / name).samefile(folder / name)
    check_integrity(store)


def test_a_retune_writes_no_weights(store: Store, build: Build, tmp_path: Path, flip: Callable[..., None]) -> None:
    first = build("k1")
    wanted = {w.name: (w.dtype, w.shape, w.recipe) for w in Artifact.open(first).manifest.weights}
    assert store.same_weights("seed 1", wanted) is None
    assert store.same_weights("seed 0", wanted | {"norm": ("float32", (13,), [])}) is None
    same = store.same_weights("seed 0", wanted)
    assert same is not None
    with store.building("k2") as writer:
        assert writer is not None
        writer.reuse_weights(same)
        fields = {n: getattr(same.manifest, n) for n in ("key_inputs", "target", "model", "options", "groups", "states", "report")}
        writer.finish(key="k2", **fields)
    second = store.open("k2")
    second.verify()
    assert (second.root / "weights.bin").samefile(first / "weights.bin")
    assert second.manifest.weights == same.manifest.weights
    flip(first / "weights.bin", 5)
    with pytest.raises(ArtifactError, match=r"weights\.bin"):
        ArtifactWriter(tmp_path).reuse_weights(same)


def test_copy_out(store: Store, build: Build, tmp_path: Path) -> None:
    folder = build("k1")
    out = tmp_path / "deep" / "out"
    store.copy_out("k1", out)
    store.copy_out("k1", out)
    assert Artifact.open(out).manifest == Artifact.open(folder).manifest
    assert (out / "weights.bin").samefile(folder / "weights.bin")
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    build("k2", seed=1)
    with pytest.raises(ArtifactError, match="is there already"):
        store.copy_out("k2", out)
    store.remove("k1")
    store.gc()
    Artifact.open(out).verify()


def test_copy_out_to_another_file_system_copies(store: Store, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build("k1")
    monkeypatch.setattr(os, "link", refuse(errno.EXDEV))
    store.copy_out("k1", tmp_path / "out")
    Artifact.open(tmp_path / "out").verify()
    assert not (tmp_path / "out" / "weights.bin").samefile(folder / "weights.bin")
    monkeypatch.setattr(os, "link", refuse(errno.EMLINK))
    with pytest.raises(OSError, match="Too many links"):
        store.copy_out("k1", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def refuse(code: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("operation", ["pwrite", "fsync", "link", "replace", "rename", "mkdir"])
def test_a_full_disk_is_an_error_that_breaks_nothing(store: Store, build: Build, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build("k0", seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, refuse(errno.ENOSPC))
        with pytest.raises(ArtifactError, match=r"cannot write .*No space left on device; free some space"):
            build("k1")
    assert store.find("k1") is None
    assert list((store.home / "building").iterdir()) == []
    Artifact.open(before).verify()
    Artifact.open(build("k1")).verify()
    check_integrity(store)


@pytest.fixture
def open_home() -> Iterator[Store]:
    """A store that every user may reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield Store(folder / "home")
    for path in (folder / "home").rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_store_serves_and_says_why_it_cannot_build(open_home: Store, builder: SimpleNamespace, builders: Any) -> None:
    with open_home.building("k1") as writer:
        builder.write(writer, "k1")
    for path in (open_home.home, *open_home.home.rglob("*")):
        if path.is_dir():
            path.chmod(0o555)
    words = builders.words(builders.start(open_home, "k1", "nobody"))
    assert words[0] == "opened k1"
    words = builders.words(builders.start(open_home, "k2", "nobody"))
    assert words[-1].startswith("refused: cannot write")
    assert "Permission denied; write to a folder of your own (INGOT_HOME" in words[-1]


def test_two_builders_build_once(store: Store, builders: Any) -> None:
    first = builders.start(store, "k1", "hold")
    builders.await_word("building", first)
    second = builders.start(store, "k1")
    builders.await_word("waiting", second)
    other = builders.start(store, "k2")
    assert builders.words(other) == ["building", "built"]  # another key waits for nobody
    assert store.find("k1") is None
    assert store.gc() == NOTHING  # and gc leaves those who are at work alone
    (store.home / "go").touch()
    assert builders.words(first) == ["built"]
    assert builders.words(second) == ["found"]
    check_integrity(store)


def test_who_waits_builds_when_the_first_is_killed(store: Store, builders: Any) -> None:
    first = builders.start(store, "k1", "hold")
    builders.await_word("building", first)
    second = builders.start(store, "k1")
    builders.await_word("waiting", second)
    builders.kill(first)
    assert builders.words(second) == ["building", "built"]
    check_integrity(store)


def test_kill_at_any_moment_leaves_a_store_that_works(store: Store, builders: Any, build: Build, rng: random.Random) -> None:
    pid = builders.start(store, "measured")
    start = time.perf_counter()
    assert builders.words(pid) == ["building", "built"]
    duration = time.perf_counter() - start
    store.remove("measured")
    store.gc()
    leftovers = 0
    for i in range(20):
        pid = builders.start(store, f"k{i % 3}")
        time.sleep(rng.uniform(0, duration))
        builders.kill(pid)
        leftovers += (store.home / "building" / f"k{i % 3}").exists()
        for listed in store.list():
            assert listed.problem == ""
            Artifact.open(listed.path).verify()
            store.remove(listed.key)
        if i % 5 == 4:
            check_integrity(store)
    for key in ("k0", "k1", "k2"):
        Artifact.open(build(key)).verify()
    check_integrity(store)
    assert len(store.list()) == 3
    assert leftovers > 0  # else every kill came too early or too late, and nothing was tried


def test_a_leftover_of_a_killed_builder_is_collected(store: Store, builders: Any) -> None:
    pid = builders.start(store, "k1", "hold")
    builders.await_word("building", pid)
    builders.kill(pid)
    (store.home / "building" / "k1" / "weights.bin").write_bytes(bytes(1000))
    assert store.find("k1") is None
    assert store.list() == ()
    assert store.gc() == Collected(1, 0, 1000)
