"""`ingot tune` and the compile that reads its table, with real kernels of a small model on this machine's CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ingot.artifacts.artifact import Artifact
from ingot.compiler import tuning
from ingot.compiler.build import CompileError, CompileOptions, compile_model
from ingot.compiler.tune import tune
from ingot.compiler.tuning import TuningError
from ingot.models import tiny
from ingot.ops.target import host
from ingot.runtime import LLM, SamplingParams

OPTIONS = {"target": "cpu", "dtype": "float32", "max_num_seqs": 2, "max_num_batched_tokens": 2}


def test_a_tuned_model_takes_what_was_measured(tmp_path: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_HOME", str(shared_home))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "tuned")
    model = tmp_path / "tiny"
    tiny.config("llama").save_pretrained(model)
    stages: list[str] = []
    report = tune([str(model)], CompileOptions(**OPTIONS), tmp_path / "tuned" / f"{tuning.slug(host().device)}.json", lambda stage, done: stages.append(stage))  # type: ignore[arg-type]
    table = json.loads(report.path.read_text())
    assert (table["device"], table["isa"]) == (host().device, host().isa)
    assert len(table["entries"]) == report.entries > 3
    assert {e["call"].split()[0] for e in table["entries"].values()} >= {"linear", "linear_glu"}
    assert any("measure" in s for s in stages)
    built = compile_model(str(model), CompileOptions(dummy_weights=True, **OPTIONS))  # type: ignore[arg-type]
    artifact = Artifact.open(built.path)
    reasons = {e.reason for v in artifact.manifest.variants for e in artifact.plan(v).entries if e.target.startswith("ingot.linear")}
    assert reasons
    assert all("in the tuning table" in r for r in reasons)
    assert artifact.manifest.key_inputs["tuning"].startswith(report.path.name)
    assert artifact.manifest.report["kernels_compiled"] == 0  # the chosen ones were compiled to be measured
    more = tune([str(model)], CompileOptions(**OPTIONS | {"max_num_batched_tokens": 3}), report.path, add=True)  # type: ignore[arg-type]
    added = json.loads(report.path.read_text())["entries"]
    assert len(added) == more.entries > report.entries
    assert table["entries"].items() < added.items(), "what was measured stays as it was"
    assert len(LLM(built.path).generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids) == 4


def test_what_is_not_here_cannot_be_tuned(tmp_path: Path) -> None:
    tiny.config("llama").save_pretrained(tmp_path)
    with pytest.raises(TuningError, match=r"cuda/sm_90 is not here to measure on"):
        tune([str(tmp_path)], CompileOptions(target="sm_90"), tmp_path / "table.json")
    with pytest.raises(CompileError, match=r"--tune measures kernels and --defer-gate runs none"):
        compile_model(str(tmp_path), CompileOptions(target="cpu", tune=True, defer_gate=True))
