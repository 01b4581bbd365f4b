"""What can go wrong between a model and its artifact: each fault is one clear error, and nothing that was there is lost.

`tests/artifacts/` has the faults of the store and of artifacts alone, `tests/models/` those of checkpoints.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.files import ArtifactError
from ingot.artifacts.gate import run
from ingot.artifacts.launch_tvm import load
from ingot.artifacts.store import Store
from ingot.compiler.build import CompileError, CompileOptions, compile_model
from ingot.models import tiny
from ingot.models.checkpoint import CheckpointError
from ingot.models.source import SourceError
from ingot.models.swaps.context import TraceError
from ingot.ops.errors import IngotError

ROOT = Path(__file__).parent.parent
SERVER = Path(__file__).with_name("compile_server.py")
ForkServer = runpy.run_path(str(Path(__file__).with_name("fork_server.py")))["ForkServer"]
OPTIONS = CompileOptions(target="x86-64-v3", dtype="float32", max_num_seqs=1, max_num_batched_tokens=1)


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    """One layer, with weights and a tokenizer, where the user nobody may read it."""
    parent = Path(tempfile.mkdtemp())
    folder = parent / "tiny"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny.config("llama", num_hidden_layers=1)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "z": 127}}}))
    for path in (parent, folder, *folder.iterdir()):
        path.chmod(0o755)
    yield folder
    shutil.rmtree(parent)


@pytest.fixture(scope="module")
def warm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that has every kernel, so that compiling again takes a second; this process compiles into it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGOT_HOME", str(home))
        compile_model(str(model), OPTIONS)
        yield Store(home)


@pytest.fixture
def store(warm: Store, model: Path) -> Iterator[Store]:
    """Without the artifact, and afterwards with it again."""
    (key,) = (listed.key for listed in warm.list())
    warm.remove(key)
    yield warm
    compile_model(str(model), OPTIONS)


class Compilers(ForkServer):
    """Compilations as processes."""

    def start(self, home: Path, mode: str = "plain") -> int:
        """The pid of a process that begins to compile."""
        self.ask(home, mode)
        pid, word = self.read()
        assert word == "started"
        return pid

    def finish(self, home: Path, mode: str = "plain") -> str:
        """What a compilation says at its end."""
        pid = self.start(home, mode)
        who, word = self.read()
        assert who == pid
        return word


@pytest.fixture(scope="module")
def compilers(model: Path) -> Iterator[Compilers]:
    running = Compilers(SERVER, model)
    yield running
    running.close()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.nightly)])
def test_a_compiler_killed_at_any_moment_leaves_a_store_that_works(kills: int, compilers: Compilers, warm: Store, tmp_path: Path) -> None:
    """The moments are spread over a whole compilation, its kernels' included; the next one succeeds, and nothing is left over."""
    (wanted,) = warm.list()
    assert wanted.manifest is not None
    duration = wanted.manifest.report["seconds"]["total"]
    home, rng = tmp_path / "home", random.Random(kills)
    unfinished = 0
    for i in range(kills):
        pid = compilers.start(home)
        time.sleep(duration * (i + rng.random()) / kills)
        compilers.kill(pid)
        unfinished += Store(home).find(wanted.key) is None
        for listed in Store(home).list():
            assert listed.problem == ""
        if i % 2:
            Store(home).gc()
            assert list((home / "building").glob("*")) == []
            shutil.rmtree(home)
    assert unfinished > 0  # else every kill came too late, and nothing was tried
    assert compilers.finish(home) == f"compiled {wanted.key}"
    assert Store(home).open(wanted.key).manifest.digest == wanted.manifest.digest
    assert list((home / "building").iterdir()) == []


def refuse(code: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("operation", ["write_bytes", "pwrite", "fsync", "rename"])
def test_a_full_disk_ends_a_compilation_with_a_remedy(operation: str, store: Store, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the disk is found to be full: at a kernel or plan, in the weights, at the flush, at the end."""
    with monkeypatch.context() as patch:
        patch.setattr(Path if operation == "write_bytes" else os, operation, refuse(errno.ENOSPC))
        with pytest.raises(ArtifactError, match=r"cannot write .*No space left on device; free some space \(`ingot artifacts gc`\)"):
            compile_model(str(model), OPTIONS)
    assert store.list() == ()
    assert list((store.home / "building").iterdir()) == []


def test_a_file_that_may_not_grow_is_told(compilers: Compilers, warm: Store, tmp_path: Path) -> None:
    """The operating system refuses a write in earnest, here by a limit that the weights exceed and no kernel does."""
    shutil.copytree(warm.home / "blobs", tmp_path / "home" / "blobs")
    shutil.copytree(warm.home / "kernels", tmp_path / "home" / "kernels")
    said = compilers.finish(tmp_path / "home", "limit")
    assert re.match(r"refused: cannot write .*weights\.bin: File too large; raise the limit", said), said
    assert list((tmp_path / "home" / "building").iterdir()) == []


@pytest.fixture
def shared_home() -> Iterator[Path]:
    """A folder that every user may reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder / "home"
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_store_gives_what_it_has_and_refuses_the_rest(compilers: Compilers, warm: Store, shared_home: Path) -> None:
    (listed,) = warm.list()
    shutil.copytree(warm.home / "artifacts", shared_home / "artifacts")
    for path in (shared_home, *shared_home.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert compilers.finish(shared_home, "nobody") == f"compiled {listed.key}"
    for path in (shared_home, shared_home / "artifacts"):
        path.chmod(0o755)
    shutil.rmtree(shared_home / "artifacts" / listed.key)
    shared_home.chmod(0o555)
    said = compilers.finish(shared_home, "nobody")
    assert re.match(r"refused: cannot write .*Permission denied; write to a folder of your own \(INGOT_HOME", said), said


def copy(model: Path, folder: Path, **config: Any) -> Path:
    """The model with another config."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


LIES: list[tuple[dict[str, Any], type[IngotError], str]] = [
    ({"hidden_size": 96}, CheckpointError, r"wrong: model\.embed_tokens\.weight should be \[128, 96\] and is \[128, 64\]"),
    ({"vocab_size": 130}, CheckpointError, r"wrong: model\.embed_tokens\.weight should be \[130, 64\]"),
    ({"num_attention_heads": 8}, CheckpointError, r"wrong: model\.layers\.0\.self_attn\.q_proj\.weight should be \[128, 64\]"),
    ({"num_key_value_heads": 1}, CheckpointError, r"wrong: model\.layers\.0\.self_attn\.k_proj\.weight should be \[16, 64\]"),
    ({"head_dim": 32}, CheckpointError, r"wrong: model\.layers\.0\.self_attn\.q_proj\.weight should be \[128, 64\]"),
    ({"intermediate_size": 97}, CheckpointError, r"wrong: model\.layers\.0\.mlp\.gate_proj\.weight should be \[97, 64\]"),
    ({"num_hidden_layers": 2}, CheckpointError, r"missing: model\.layers\.1\.self_attn"),
    ({"num_hidden_layers": 0}, CheckpointError, r"surplus: model\.layers\.0\."),
    ({"tie_word_embeddings": True}, CheckpointError, r"lm_head\.weight and model\.embed_tokens\.weight are tied by the config and differ"),
    ({"hidden_size": 0}, IngotError, r"config\.json"),
    ({"hidden_size": -64}, IngotError, r"config\.json"),
    ({"num_attention_heads": 0}, IngotError, r"config\.json"),
    ({"hidden_act": "nope"}, TraceError, r"cannot build LlamaForCausalLM from its config\.json: KeyError: 'nope'"),
    ({"num_hidden_layers": "2"}, SourceError, r"config\.json does not describe a llama model"),
    ({"max_position_embeddings": -1}, CompileError, r"a context of -1 tokens; correct max_position_embeddings"),
    ({"max_position_embeddings": 10**12}, CompileError, r"a context of 1000000000000 tokens, and positions have 31 bits; correct max_position_embeddings"),
]


@pytest.mark.parametrize(("lie", "kind", "said"), LIES, ids=[json.dumps(lie) for lie, _, _ in LIES])
def test_a_config_that_lies_is_found_before_the_long_work(
    lie: dict[str, Any], kind: type[IngotError], said: str, warm: Store, model: Path, tmp_path: Path
) -> None:
    stages: list[str] = []
    with pytest.raises(kind, match=said):
        compile_model(str(copy(model, tmp_path / "m", **lie)), OPTIONS, progress=lambda stage, done: stages.append(stage))
    assert set(stages) <= {"trace"}
    assert len(warm.list()) == 1
    assert list((warm.home / "building").iterdir()) == []


@pytest.mark.parametrize(("flag", "most"), [("max_num_seqs", 4096), ("max_num_batched_tokens", 1 << 20)])
def test_sizes_beyond_all_measure_are_refused_with_what_fits(flag: str, most: int, model: Path) -> None:
    with pytest.raises(CompileError, match=rf"--{flag.replace('_', '-')} {10**9}: a step takes at most {most}"):
        compile_model(str(model), replace(OPTIONS, **{flag: 10**9}))


def test_weights_that_are_not_numbers_are_refused_by_name(warm: Store, model: Path, tmp_path: Path) -> None:
    folder = copy(model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {re.escape(name)} holds NaN or infinity; download"):
        compile_model(str(folder), OPTIONS)
    assert len(warm.list()) == 1
    assert list((warm.home / "building").iterdir()) == []


def test_a_tokenizer_of_another_model_is_refused(warm: Store, model: Path, tmp_path: Path) -> None:
    folder = copy(model, tmp_path / "m")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 128, "content": "<new>"}]}))
    with pytest.raises(SourceError, match=r"the model's vocabulary of 128 does not: '<new>' \(128\)"):
        compile_model(str(folder), OPTIONS)


def test_a_folder_that_is_taken_is_told_before_the_long_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_HOME", str(tmp_path / "home"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    stages: list[str] = []
    with pytest.raises(ArtifactError, match=r"out is there already and is not this artifact; name another folder"):
        compile_model(str(model), OPTIONS, output=tmp_path / "out", progress=lambda stage, done: stages.append(stage))
    assert stages == []


def test_a_kernel_that_cannot_be_loaded_is_named(warm: Store, tmp_path: Path) -> None:
    """Not damaged since it was written, which its hash would tell, but nothing that this machine can load."""
    (listed,) = warm.list()
    kernel = Artifact.open(listed.path).manifest.kernels[0]
    (tmp_path / "kernel.so").write_bytes(b"no shared object")
    with pytest.raises(ArtifactError, match=r"kernel\.so cannot be loaded .*; compile the model on this machine"):
        load(kernel, tmp_path / "kernel.so")


def test_a_gate_record_that_cannot_be_written_is_told(warm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (listed,) = warm.list()
    artifact = Artifact.open(listed.path)
    monkeypatch.setattr(Path, "write_bytes", refuse(errno.EROFS))
    with pytest.raises(ArtifactError, match=r"cannot write .*gate\.json: Read-only file system; write to a folder of your own"):
        run(artifact)


STREAM = """
import sys
from ingot.compiler.build import CompileOptions, compile_model
print("imported", flush=True)
compile_model(sys.argv[1], CompileOptions(target="x86-64-v3", dtype="bfloat16", max_num_seqs=1, max_num_batched_tokens=1))
"""


@pytest.mark.nightly
def test_a_checkpoint_larger_than_memory_is_streamed(tmp_path: Path) -> None:
    """Anonymous memory holds a weight, the buffers that are being hashed, and what the gate draws for one call; never the checkpoint."""
    config = tiny.config("llama", num_hidden_layers=16, hidden_size=1024, intermediate_size=5632, num_attention_heads=16, num_key_value_heads=4, head_dim=64)
    folder, parameters = tmp_path / "large", AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    folder.mkdir()
    config.save_pretrained(folder)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in parameters.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(f"model-{layer[1] if layer else 'ends'}.safetensors", {})[name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: f for f, tensors in shards.items() for n in tensors}}))
    total = sum(t.nbytes for t in parameters.values())
    assert total > 600 << 20
    env = os.environ | {"INGOT_HOME": str(tmp_path / "home"), "INGOT_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", STREAM, str(folder)], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "imported\n"
        before, peak = anonymous(process.pid), 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
    assert process.returncode == 0
    print(f"{(peak - before) >> 20} MiB beyond {before >> 20} MiB for a checkpoint of {total >> 20} MiB")
    assert peak - before < total // 3


def anonymous(pid: int) -> int:
    """Bytes of a process that no file backs; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) << 10 if found else 0
