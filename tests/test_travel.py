"""Artifacts that travel: compiled for a machine that is not here, moved, gated and run there, by other processes with stores of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ingot.artifacts import gate
from ingot.artifacts.artifact import Artifact
from ingot.artifacts.check import describe, read_checks
from ingot.artifacts.difference import differences
from ingot.artifacts.files import ArtifactError
from ingot.artifacts.gate import run
from ingot.artifacts.gate_record import DEFERRED, GateError, GateRecord, path_of, verdicts
from ingot.artifacts.store import Store
from ingot.compiler.build import CompileOptions, compile_model
from ingot.models import tiny
from ingot.ops.target import GPU_ARCHES, TargetError, here
from ingot.runtime.llm import LLM
from ingot.runtime.request import SamplingParams
from ingot.serve.commands.inspect import describe as describe_artifact

SMALL = {"dtype": "float32", "max_num_seqs": 1, "max_num_batched_tokens": 1, "dummy_weights": True}
HALF = SMALL | {"dtype": "bfloat16"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGOT_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 2: two page groups, and regions, whose references are no dialect ops."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.config("gemma2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deferred(home: Path, model: Path) -> Artifact:
    """For a CPU of the lowest level, every gate still to be run."""
    built = compile_model(str(model), CompileOptions(target="x86-64-v3", defer_gate=True, **SMALL))
    return Artifact.open(built.path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of few kernels."""
    folder = tmp_path_factory.mktemp("small") / "tiny"
    tiny.config("llama", num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cubins(home: Path, small: Path) -> Artifact:
    """For a GPU that need not be here."""
    built = compile_model(str(small), CompileOptions(target="sm_90", defer_gate=True, **HALF))
    return Artifact.open(built.path)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Cli:
    """The command line of another machine: a new process, and a store that is empty at first."""

    def call(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"INGOT_HOME": str(tmp_path / "elsewhere"), "INGOT_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "ingot.serve.cli", *map(str, args)], env=env, capture_output=True, text=True, timeout=250)
        assert done.returncode == code, done.stderr
        return done

    return call


def test_a_deferred_gate_is_run_where_the_artifact_arrives(deferred: Artifact, elsewhere: Cli, tmp_path: Path, home: Path) -> None:
    assert set(verdicts(deferred).values()) == {DEFERRED}
    Store(home).export(deferred.manifest.key, tmp_path / "model.tar")
    folder = Path(elsewhere("artifacts", "import", tmp_path / "model.tar").stdout.strip())
    key = folder.name[:12]
    before = elsewhere("generate", key, "--prompt-ids", "5,6,7", "--max-tokens", 3)
    assert f"were never compared with their references; do it with: ingot artifacts verify --gate {folder}" in before.stderr
    kernels = len(deferred.manifest.kernels)
    assert f"good; {kernels} kernels agree with their references on " in elsewhere("artifacts", "verify", "--gate", key).stdout
    after = elsewhere("generate", key, "--prompt-ids", "5,6,7", "--max-tokens", 3)
    assert "never compared" not in after.stderr
    assert after.stdout == before.stdout
    assert {v.partition("(")[0] for v in verdicts(Artifact.open(folder)).values()} == {"passed"}
    assert all(k["gate"].startswith("passed(") for k in describe_artifact(Artifact.open(folder))["kernels"])
    Artifact.open(folder).verify()  # the record lies beside it, not in it
    Store(folder.parents[1]).remove(folder.name)
    assert not path_of(folder).exists()


COMPILE = """
import json, sys
from ingot.artifacts.artifact import Artifact
from ingot.compiler.build import CompileOptions, compile_model
built = compile_model(sys.argv[1], CompileOptions(**json.loads(sys.argv[2])))
print(built.key, Artifact.open(built.path).manifest.digest)
"""


def check_reproducible(artifact: Artifact, model: Path, options: dict[str, object], folder: Path) -> None:
    """Another process, hash seed, folder, number of jobs; no kernel compiled before; the gate run, not deferred; a copy of the model."""
    copy = shutil.copytree(model, folder / "copy" / model.name)
    env = os.environ | {"INGOT_HOME": str(folder / "home"), "PYTHONHASHSEED": "12345", "INGOT_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", COMPILE, str(copy), json.dumps(options)], env=env, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [artifact.manifest.key, artifact.manifest.digest]


def test_equal_inputs_give_equal_artifacts(deferred: Artifact, model: Path, tmp_path: Path) -> None:
    check_reproducible(deferred, model, SMALL | {"target": "x86-64-v3"}, tmp_path)


@pytest.mark.nightly
def test_equal_inputs_give_equal_artifacts_for_a_gpu(cubins: Artifact, small: Path, tmp_path: Path) -> None:
    check_reproducible(cubins, small, HALF | {"target": "sm_90"}, tmp_path)


def test_kernels_from_the_cache_give_the_same_artifact(deferred: Artifact, home: Path, model: Path) -> None:
    first = deferred.manifest
    Store(home).remove(first.key)
    built = compile_model(str(model), CompileOptions(target="x86-64-v3", defer_gate=True, **SMALL))
    assert (built.hit, built.report["kernels_compiled"]) == (False, 0)
    assert Artifact.open(built.path).manifest.digest == first.digest


def test_two_keys_can_be_compared(deferred: Artifact, cubins: Artifact) -> None:
    found = differences(deferred, cubins)
    assert found["target"] == ["cpu/x86-64:avx2+fma → cuda/sm_90"]
    assert found["options"] == ['dtype: "float32" → "bfloat16"', 'kv_cache_dtype: "float32" → "bfloat16"']
    assert 'model_type: "gemma2" → "llama"' in found["config"]
    assert [line.partition(":")[0] for line in found["compiler"]] == ["cc"]


def test_the_deferred_gate_is_the_compilers(deferred: Artifact, home: Path) -> None:
    """Every check comes back from JSON as it was, and a kernel that computes something else fails it."""
    checks = read_checks(deferred)
    assert {k for c in checks for k in c.kernels} == {k.name for k in deferred.manifest.kernels}
    assert any(c.returns for c in checks)
    for check in checks:
        call, candidate = check.restore()
        assert describe(call, check.steps, candidate, [x.kernel for x in check.launches], check.reference, check.returns) == check


def test_kernels_that_fail_are_not_served(deferred: Artifact, home: Path, tmp_path: Path) -> None:
    """The record of a machine on which a kernel computed something else."""
    Store(home).copy_out(deferred.manifest.key, tmp_path / "out")
    artifact = Artifact.open(tmp_path / "out")
    kernel = artifact.manifest.kernels[0].name
    GateRecord(artifact.manifest.digest, "a CPU", {kernel: 0.5}, {kernel: "error 5.0e-01"}).write(artifact)
    with pytest.raises(GateError, match=rf"{kernel}: failed\(error 5.0e-01\); compile the model here"):
        LLM(artifact.root)
    GateRecord("another", "a CPU", {kernel: 0.5}, {kernel: "error 5.0e-01"}).write(artifact)  # of what was in the folder before
    assert LLM(artifact.root).generate([[5, 6, 7]], GREEDY)
    path_of(artifact.root).write_text("{")
    with pytest.raises(ArtifactError, match=r"is damaged .*; delete it, and run"):
        LLM(artifact.root)


def test_a_wrong_kernel_fails_its_gate(deferred: Artifact, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every kernel were one percent off."""
    Store(home).copy_out(deferred.manifest.key, tmp_path / "out")
    artifact = Artifact.open(tmp_path / "out")
    original = gate.relative
    monkeypatch.setattr(gate, "relative", lambda actual, expected: original(actual * 1.01, expected))
    record = run(artifact)
    assert record.failed
    assert all("at most 1e-04" in v for v in record.failed.values())
    with pytest.raises(GateError):
        LLM(artifact.root)


def check_target(artifact: Artifact, backend: str) -> None:
    """Kernels came out; a gate that cannot be run is deferred, and another machine refuses the artifact by both names."""
    manifest = artifact.manifest
    assert {k.backend for k in manifest.kernels} == {backend}
    assert manifest.target.device == ""
    assert {k for c in read_checks(artifact) for k in c.kernels} == {k.name for k in manifest.kernels}
    if manifest.target.runs_on(here(manifest.target.kind)):
        assert LLM(artifact.root).generate([[5, 6, 7]], GREEDY)
        return
    assert set(verdicts(artifact).values()) == {DEFERRED}
    for use in (lambda: LLM(artifact.root), lambda: run(artifact)):
        with pytest.raises(TargetError, match=r"the artifact is for .*this machine.*ingot compile tiny"):
            use()


def test_a_gpu_that_is_not_here(cubins: Artifact) -> None:
    check_target(cubins, "triton")


LEVELS = ["x86-64-v4", "cpu:avx2+fma+avx512f+avx512bw+avx512vl+avx512_vnni+avx512_bf16"]


@pytest.mark.nightly
@pytest.mark.parametrize("target", [*LEVELS, *GPU_ARCHES])
def test_every_target_is_compiled_for_without_the_machine(target: str, model: Path, home: Path) -> None:
    built = compile_model(str(model), CompileOptions(target=target, **HALF))
    check_target(Artifact.open(built.path), "triton" if target in GPU_ARCHES else "tvm")


KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "an encoder": ("bert", {}),
    "quantized weights": ("llama", {"quantize": "int8"}),
    "a quantized cache": ("llama", {"kv_cache_dtype": "int8"}),
    "latent attention and experts": ("deepseek_v3", {}),
    "recurrent states": ("mamba2", {}),
}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_artifact_can_be_gated_later(kind: str, home: Path, tmp_path: Path) -> None:
    """Calls of every op come back from JSON, and agree with their references as they would have at compilation."""
    model_type, options = KINDS[kind]
    tiny.config(model_type).save_pretrained(tmp_path / "tiny")
    built = compile_model(str(tmp_path / "tiny"), CompileOptions(target="x86-64-v3", defer_gate=True, **SMALL | {"max_num_batched_tokens": 17} | options))
    artifact = Artifact.open(built.path)
    record = run(artifact)
    assert record.failed == {}
    assert record.errors.keys() == {k.name for k in artifact.manifest.kernels}
    on_gpu = compile_model(str(tmp_path / "tiny"), CompileOptions(target="sm_90", **HALF | options))
    for check in read_checks(Artifact.open(on_gpu.path)):
        call, candidate = check.restore()
        assert describe(call, check.steps, candidate, [x.kernel for x in check.launches], check.reference, check.returns) == check
