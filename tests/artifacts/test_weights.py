from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ingot.artifacts.artifact import Artifact, ArtifactWriter
from ingot.artifacts.files import ArtifactError
from ingot.artifacts.manifest import CHUNK_BYTES
from ingot.artifacts.weights import ALIGNMENT, WeightsWriter, load, recipe_from_json, recipe_to_json
from ingot.ops.graph import Recipe

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_bit_comes_back(artifact: Artifact, builder: SimpleNamespace, device: str, threads: int) -> None:
    done: list[tuple[int, int]] = []
    loaded = load(artifact, device, threads, progress=lambda *at: done.append(at))
    assert list(loaded) == [*builder.tensors(0, large=True), "dummy"]
    for name, expected in builder.tensors(0, large=True).items():
        assert loaded[name].device.type == device
        assert same_bits(loaded[name].cpu(), expected), name
    size = artifact.manifest.weight_bytes
    assert len(artifact.manifest.weight_chunks) == 2
    assert sorted(done)[-1] == (size, size)
    assert all(w.offset % ALIGNMENT == 0 for w in artifact.manifest.weights if w.offset >= 0)
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in loaded.values() if t.numel())


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_makes_the_same_values_twice(artifact: Artifact, builder: SimpleNamespace, tmp_path: Path, device: str) -> None:
    first, second = (load(artifact, device)["dummy"] for _ in range(2))
    assert same_bits(first, second)
    assert (first.dtype, first.shape) == (torch.bfloat16, (33, 7))
    assert 0.0 < first.float().mean() < 0.5
    assert 1.3 < first.float().std() < 1.7
    builder.write(ArtifactWriter(tmp_path), "other", seed=1)
    assert not torch.equal(load(Artifact.open(tmp_path), device)["dummy"], first)


@pytest.mark.parametrize("device", DEVICES)
def test_a_damaged_chunk_is_refused_wherever_it_is(artifact: Artifact, device: str, flip: Callable[..., None]) -> None:
    path = artifact.path("weights.bin")
    for offset in (CHUNK_BYTES - 1, CHUNK_BYTES):
        flip(path, offset)
        with pytest.raises(ArtifactError, match=rf"weights\.bin: bytes {offset // CHUNK_BYTES * CHUNK_BYTES} to"):
            load(artifact, device)
        flip(path, offset)
    load(artifact, device)


def test_on_a_cpu_weights_are_one_shared_read_only_mapping(artifact: Artifact) -> None:
    loaded = load(artifact, "cpu")
    mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(artifact.path("weights.bin")))]
    spans = {tuple(int(a, 16) for a in m[0].split("-")) for m in mappings}
    assert {m[1] for m in mappings} == {"r--s"}
    for weight in artifact.manifest.weights:
        if weight.nbytes:
            assert any(begin <= loaded[weight.name].data_ptr() < end for begin, end in spans)


def test_tensors_need_not_be_contiguous(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path / "weights.bin", threads=2)
    tensor = torch.randn(7, 5).bfloat16()
    writer.add("t", tensor.t()[1::2], Recipe("tensor", ("t",)))
    (table,), chunks = writer.close()
    assert (table.shape, table.nbytes, len(chunks)) == ((2, 7), 28, 1)
    assert (tmp_path / "weights.bin").read_bytes() == tensor.t()[1::2].contiguous().view(torch.uint8).numpy().tobytes()
    assert writer.gigabytes_per_second > 0
    with pytest.raises(ArtifactError, match="weight t is added twice"):
        writer.add_seed("t", torch.int8, (1,), Recipe("seed", (1, 0.0, 1.0)))


def test_seeds_alone_need_no_file(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path / "weights.bin", threads=2)
    writer.add_seed("t", torch.float32, (3,), Recipe("seed", (1, 0.0, 1.0)))
    (table,), chunks = writer.close()
    assert (table.offset, table.nbytes, chunks) == (-1, 0, ())
    assert not (tmp_path / "weights.bin").exists()


def test_recipes_as_json(artifact: Artifact) -> None:
    recipe = Recipe("slice", (1, 3, 9), (Recipe("transpose", (0, 1), (Recipe("tensor", ("model.embed_tokens.weight",)),)),))
    assert recipe_from_json(recipe_to_json(recipe)) == recipe
    assert recipe_to_json(recipe) == ["slice", [1, 3, 9], [["transpose", [0, 1], [["tensor", ["model.embed_tokens.weight"], []]]]]]
    stored = {w.name: recipe_from_json(w.recipe) for w in artifact.manifest.weights}
    assert stored["dummy"] == Recipe("seed", (41, 0.25, 1.5))
    assert stored["norm"].sources == ["model.norm"]
    for wrong in (None, "tensor", ["tensor", ["a"]], [1, [], []], ["cat", [0], ["x"]]):
        with pytest.raises(ArtifactError, match="is not a recipe"):
            recipe_from_json(wrong)
