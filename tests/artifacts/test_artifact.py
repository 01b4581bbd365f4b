from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from ingot.artifacts.artifact import Artifact, ArtifactWriter
from ingot.artifacts.files import ArtifactError
from ingot.artifacts.manifest import SCHEMA_VERSION, Manifest, decode, encode, seal
from ingot.artifacts.weights import load
from ingot.ops.graph import Recipe

Flip = Callable[..., None]
BUILDER_FILES = [
    "manifest.json", "config.json", "tokenizer/tokenizer.json", "plans/decode_1.json", "plans/prefill_17.json", "weights.bin",
    *(f"kernels/{k}.{s}" for k in ("rms_norm_0a1b", "gemv_2c3d", "rope_4e5f") for s in ("py", "so")),
]  # fmt: skip


def test_round_trip(artifact: Artifact, builder: SimpleNamespace, tmp_path: Path) -> None:
    assert artifact.manifest.model.max_model_len == 777
    assert artifact.manifest.report["seconds"]["total"] == 3e-7
    plan = artifact.plan("prefill_17")
    assert plan.values[0].shape == ({"T": 2, "": 1}, 64)
    assert plan.entries[0].kernel == "gemv_2c3d"
    kernel = artifact.manifest.kernels[0]
    assert len(artifact.read(kernel.file)) == 3001
    assert artifact.path(kernel.source).read_text() == "# rms_norm_0a1b α\n"
    artifact.verify()
    moved = shutil.copytree(artifact.root, tmp_path / "elsewhere")
    assert Artifact.open(moved).manifest == artifact.manifest


def test_the_same_content_has_the_same_digest(artifact: Artifact, builder: SimpleNamespace, tmp_path: Path) -> None:
    again = builder.write(ArtifactWriter(tmp_path / "a"), artifact.manifest.key, large=True)
    assert (again.digest, again.report_digest) == (artifact.manifest.digest, artifact.manifest.report_digest)
    slower = seal(msgspec.structs.replace(again, report={"seconds": 7}))
    assert slower.digest == again.digest
    assert slower.report_digest != again.report_digest
    changed = seal(msgspec.structs.replace(again, files=again.files | {"config.json": "0" * 64}))
    assert changed.digest != again.digest


def test_nothing_can_be_written_afterwards(artifact: Artifact) -> None:
    assert {path.stat().st_mode & 0o777 for path in map(artifact.path, artifact.relative_paths())} == {0o444}


def test_these_are_all_the_files(artifact: Artifact) -> None:
    assert sorted(BUILDER_FILES) == sorted(artifact.relative_paths())
    assert sorted(BUILDER_FILES) == sorted(p.relative_to(artifact.root).as_posix() for p in artifact.root.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", BUILDER_FILES)
def test_a_flipped_byte_is_refused_with_the_name_of_its_file(artifact: Artifact, name: str, flip: Flip, rng: random.Random) -> None:
    path = artifact.root / name
    named = re.escape(str(path))
    for offset in [0, path.stat().st_size - 1, *(rng.randrange(path.stat().st_size) for _ in range(4))]:
        bit = rng.randrange(8)
        flip(path, offset, bit)
        with pytest.raises(ArtifactError, match=named):
            artifact.verify()
        with pytest.raises(ArtifactError, match=named):
            load(Artifact.open(artifact.root), "cpu")
        flip(path, offset, bit)
    artifact.verify()


@pytest.mark.parametrize("name", BUILDER_FILES)
def test_a_truncated_or_missing_file_is_refused_with_its_name(artifact: Artifact, name: str) -> None:
    path, aside = artifact.root / name, artifact.root / "aside"
    os.rename(path, aside)
    try:
        for half in (False, True):
            if half:
                shutil.copyfile(aside, path)
                os.truncate(path, path.stat().st_size // 2)
            with pytest.raises(ArtifactError, match=re.escape(name)):
                Artifact.open(artifact.root)
    finally:
        os.replace(aside, path)
    artifact.verify()


def test_every_byte_of_the_manifest_counts(artifact: Artifact, rng: random.Random) -> None:
    path = artifact.root / "manifest.json"
    data = path.read_bytes()
    assert decode(data, path) == artifact.manifest
    for offset in range(len(data)):
        changed = bytearray(data)
        changed[offset] ^= 1 << rng.randrange(8)
        with pytest.raises(ArtifactError, match=re.escape(str(path))):
            decode(bytes(changed), path)
        with pytest.raises(ArtifactError, match=re.escape(str(path))):
            decode(data[:offset], path)


THIS_VERSION = f'{{"schema_version": {SCHEMA_VERSION}, "name": "package.json"}}'.encode()
FOREIGN = [b"", b"{}", b"[]", b"null", b"\x80\xff", b"[" * 100_000, b'{"schema_version": "1"}', THIS_VERSION, b"\x7fELF"]


@pytest.mark.parametrize("data", FOREIGN, ids=range(len(FOREIGN)))
def test_a_foreign_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"truncated, or not a manifest of Ingot.*delete the artifact and compile"):
        decode(data, Path("manifest.json"))


@pytest.mark.parametrize(("version", "word"), [(SCHEMA_VERSION + 1, "newer.*upgrade Ingot"), (SCHEMA_VERSION - 1, "older.*compile the model again")])
def test_another_version_is_refused_whatever_else_it_says(version: int, word: str) -> None:
    with pytest.raises(ArtifactError, match=word):
        decode(msgspec.json.encode({"schema_version": version, "a_field_of_that_version": [1]}), Path("manifest.json"))


def test_a_hand_edited_manifest_is_refused(artifact: Artifact) -> None:
    for edited in (
        msgspec.structs.replace(artifact.manifest, key_inputs={"graph": "2f"}),
        msgspec.structs.replace(artifact.manifest, report={}),
        msgspec.structs.replace(artifact.manifest, digest="0" * 64),
    ):
        with pytest.raises(ArtifactError, match="changed since it was written"):
            decode(encode(edited), Path("manifest.json"))
    surplus = msgspec.to_builtins(artifact.manifest) | {"note": "hello"}
    with pytest.raises(ArtifactError, match="changed since it was written"):
        decode(msgspec.json.format(msgspec.json.encode(surplus), indent=1) + b"\n", Path("manifest.json"))


def resealed(manifest: Manifest, **fields: object) -> bytes:
    return encode(seal(msgspec.structs.replace(manifest, **fields)))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../b", "a//b", "./a", "", "a/", "nul\0"])
def test_a_path_that_leads_out_is_refused(artifact: Artifact, name: str) -> None:
    with pytest.raises(ArtifactError, match="not a path inside an artifact"):
        decode(resealed(artifact.manifest, files=artifact.manifest.files | {name: "0" * 64}), Path("manifest.json"))


def test_a_manifest_that_speaks_of_what_is_not_there_is_refused(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"plans/verify_3\.json, which is not among its files"):
        decode(resealed(artifact.manifest, variants=("verify_3",)), Path("manifest.json"))
    with pytest.raises(ArtifactError, match="not the key of an artifact"):
        decode(resealed(artifact.manifest, key="../up"), Path("manifest.json"))


def test_what_is_asked_for_must_exist(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no variant decode_2; it has decode_1, prefill_17"):
        artifact.plan("decode_2")
    with pytest.raises(ArtifactError, match=r"has no file plans/x; it has .*config\.json"):
        artifact.path("plans/x")
    with pytest.raises(ArtifactError, match=r"is not an artifact: it has no manifest\.json"):
        Artifact.open(tmp_path)


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path)
    writer.add_file("config.json", b"{}")
    for name in ("config.json", "manifest.json", "weights.bin"):
        with pytest.raises(ArtifactError, match=f"{name} is written twice"):
            writer.add_file(name, b"{ }")
    with pytest.raises(ArtifactError, match="not a path inside an artifact"):
        writer.add_file("../config.json", b"{}")
    with pytest.raises(ArtifactError, match="cannot be generated"):
        writer.weights().add_seed("w", torch.int8, (3,), Recipe("tensor", ("w",)))
