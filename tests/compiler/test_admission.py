"""What is refused before any work: architectures that were not admitted, that nobody knows, and code that comes with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ingot.compiler.build import CompileError, CompileOptions, compile_model
from ingot.models import oracle, tiny
from ingot.models.frontend import TraceError
from ingot.models.source import SourceError
from ingot.ops.errors import IngotError

OPTIONS = CompileOptions(target="cpu", dummy_weights=True)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_HOME", str(tmp_path / "home"))


def compiles(folder: Path, config: dict[str, object] | None = None, options: CompileOptions = OPTIONS) -> None:
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    compile_model(str(folder), options)


def test_a_refused_architecture_is_refused_with_its_reason(tmp_path: Path) -> None:
    tiny.config("reformer").save_pretrained(tmp_path / "m")
    reason = next(v.reason for v in oracle.load() if v.model_type == "reformer")
    with pytest.raises(CompileError, match="ReformerModelWithLMHead is not supported: ") as e:
        compiles(tmp_path / "m")
    assert reason in str(e.value)
    assert "ingot models" in str(e.value)
    assert not (tmp_path / "home").exists()


def test_an_architecture_that_the_record_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "load", lambda entry_point: [])
    tiny.config("llama").save_pretrained(tmp_path / "m")
    with pytest.raises(CompileError, match="LlamaForCausalLM has not been tried: `ingot models --run LlamaForCausalLM --save`"):
        compiles(tmp_path / "m")


def test_a_class_that_is_no_causal_language_model(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"'vit' \(ViTForImageClassification\) is neither a causal language model nor an encoder of transformers"):
        compiles(tmp_path / "m", {"model_type": "vit", "architectures": ["ViTForImageClassification"]})


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool) -> None:
    """Refused by default, and none of it ran; with the flag its config is read, and a class that transformers lacks is refused by name."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "m").mkdir()
    code = "from pathlib import Path\nfrom transformers import PretrainedConfig\n"
    code += f"Path({str(tmp_path / 'ran')!r}).touch()\nclass Own(PretrainedConfig):\n    model_type = 'own'\n"
    (tmp_path / "m/code.py").write_text(code)
    config: dict[str, object] = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": {"AutoConfig": "code.Own"}}
    kind: type[IngotError] = TraceError if trusted else SourceError
    message = "own.*OwnForCausalLM.*bring their own code are not supported" if trusted else "brings its own modeling code.*--trust-remote-code"
    with pytest.raises(kind, match=message):
        compiles(tmp_path / "m", config, CompileOptions(target="cpu", dummy_weights=True, trust_remote_code=trusted))
    assert (tmp_path / "ran").exists() == trusted
    assert CompileOptions().trust_remote_code is False
