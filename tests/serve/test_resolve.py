"""A name on the command line becomes an artifact's folder; the compiler runs only when something has changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ingot.serve import resolve as resolving
from ingot.serve.cli import app
from ingot.serve.errors import ResolveError
from ingot.serve.flags import CompileFlags
from ingot.serve.resolve import resolve


@pytest.fixture
def compiled(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What was compiled: (name, flags) of every call."""
    calls: list[tuple[str, list[str]]] = []

    def compile_instead(name: str, flags: CompileFlags) -> Path:
        calls.append((name, flags.argv))
        return artifact

    monkeypatch.setenv("INGOT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(resolving, "_compile", compile_instead)
    return calls


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_an_artifact_is_itself_and_takes_no_flags(artifact: Path, compiled: list[object]) -> None:
    assert resolve(str(artifact), CompileFlags()) == artifact
    with pytest.raises(ResolveError, match="--max-num-seqs 3 --deterministic cannot change it"):
        resolve(str(artifact), CompileFlags(max_num_seqs=3, deterministic=True))
    assert compiled == []


def _other_file(model: Path) -> CompileFlags:
    (model / "tokenizer.json").write_text("{}")
    return CompileFlags()


def _touched(model: Path) -> CompileFlags:
    os.utime(model / "config.json", ns=(1, 1))
    return CompileFlags()


@pytest.mark.parametrize("change", [_other_file, _touched, lambda model: CompileFlags(dtype="float32"), lambda model: CompileFlags(dummy_weights=True)])
def test_a_model_is_compiled_once_and_again_when_something_changed(
    model: Path, artifact: Path, compiled: list[tuple[str, list[str]]], change: Callable[[Path], CompileFlags]
) -> None:
    for _ in range(3):
        assert resolve(str(model), CompileFlags()) == artifact
    assert compiled == [(str(model), [])]
    flags = change(model)
    for _ in range(2):
        resolve(str(model), flags)
    assert compiled[1:] == [(str(model), flags.argv)]


def test_an_artifact_that_is_gone_is_compiled_again(model: Path, artifact: Path, compiled: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(str(model), CompileFlags())
    (note,) = (Path(os.environ["INGOT_HOME"]) / "resolved").iterdir()
    note.write_text(str(model))
    resolve(str(model), CompileFlags())
    assert len(compiled) == 2


def test_gc_forgets_what_is_gone_and_keeps_what_is_there(model: Path, artifact: Path, compiled: list[object]) -> None:
    resolve(str(model), CompileFlags())
    (note,) = (Path(os.environ["INGOT_HOME"]) / "resolved").iterdir()
    for name, text in (("gone", str(model)), ("cut", "")):
        note.with_name(name).write_text(text)
    assert CliRunner().invoke(app, ["artifacts", "gc"]).exit_code == 0
    assert list(note.parent.iterdir()) == [note]
    resolve(str(model), CompileFlags())
    assert len(compiled) == 1


def test_flags_travel_to_the_compiler_as_they_were_given() -> None:
    flags = CompileFlags(target="sm_90", max_num_seqs=7, dummy_weights=True)
    assert flags.argv == ["--target", "sm_90", "--max-num-seqs", "7", "--dummy-weights"]
    assert flags.given == {"target": "sm_90", "max_num_seqs": 7, "dummy_weights": True}
    assert CompileFlags().argv == []
