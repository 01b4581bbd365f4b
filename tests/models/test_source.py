"""Every way to name a model, and every mistake in doing so."""

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import LlamaConfig

from ingot.models.source import SourceError, check_vocabulary, resolve

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_folder_with_only_a_config(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", config=LlamaConfig(**SMALL, eos_token_id=7).to_dict())
    source = resolve(str(folder))
    assert (source.name, source.folder, source.config.model_type) == ("tiny", folder, "llama")
    assert (source.eos_token_ids, source.tokenizer_files, source.generation_config) == ((7,), (), {})


def test_generation_config_decides_the_eos_tokens(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL, eos_token_id=7).to_dict()
    folder = write(tmp_path / "m", config=config, generation_config={"eos_token_id": [5, 9], "top_k": 20}, tokenizer={}, tokenizer_config={}, other={})
    source = resolve(str(folder))
    assert source.eos_token_ids == (5, 9)
    assert source.generation_config["top_k"] == 20
    assert [f.name for f in source.tokenizer_files] == ["tokenizer.json", "tokenizer_config.json"]


def test_no_eos_token_is_no_error(tmp_path: Path) -> None:
    assert resolve(str(write(tmp_path / "m", config=LlamaConfig(**SMALL, eos_token_id=None).to_dict()))).eos_token_ids == ()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "no model_type 'lama'; did you mean llama"),
        ({"model_type": "zzzz"}, "no model_type 'zzzz' .a newer"),
        ({"hidden_size": 8}, "has no model_type"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "--trust-remote-code"),
        ({"model_type": "llama", "hidden_size": "wide"}, "does not describe a llama model"),
        ([], "should hold a JSON object"),
    ],
)
def test_configs_that_cannot_be_used(tmp_path: Path, config: object, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        resolve(str(write(tmp_path / "m", config=config)))


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (write(tmp_path / "m") / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"m/config\.json is not JSON"):
        resolve(str(tmp_path / "m"))


def test_repository_code_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config of its own class writes a file when it is imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = "from pathlib import Path\nfrom transformers import PretrainedConfig\n"
    code += f"Path({str(tmp_path / 'ran')!r}).touch()\nclass Own(PretrainedConfig):\n    model_type = 'own'\n"
    folder = write(tmp_path / "m", config={"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}, "depth": 5})
    (folder / "code.py").write_text(code)
    with pytest.raises(SourceError, match="brings its own modeling code"):
        resolve(str(folder))
    assert not (tmp_path / "ran").exists()
    assert resolve(str(folder), trust_remote_code=True).config.depth == 5
    assert (tmp_path / "ran").exists()


def test_auto_map_of_a_type_that_transformers_defines_is_not_used(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL).to_dict() | {"auto_map": {"AutoConfig": "configuration_own.Own"}}
    assert isinstance(resolve(str(write(tmp_path / "m", config=config))).config, LlamaConfig)


def test_things_that_are_not_models(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no config\.json"):
        resolve(str(write(tmp_path / "empty")))
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="is a file"):
        resolve(str(tmp_path / "file"))
    for name in ("nothing-here", "./a/b", str(tmp_path / "absent")):
        with pytest.raises(SourceError, match="there is no folder"):
            resolve(name)
    with pytest.raises(SourceError, match="neither a folder nor a hub id"):
        resolve("no spaces/allowed")


def test_hub_id_asks_for_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "snapshot", config=LlamaConfig(**SMALL).to_dict())
    asked = []

    def download(repo: str, *, allow_patterns: list[str], ignore_patterns: str) -> str:
        asked.append((repo, set(allow_patterns), ignore_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/Model-1B").name == "Model-1B"
    resolve("org/Model-1B", weights=False, trust_remote_code=True)
    (repo, first, ignored), (_, second, _) = asked
    assert (repo, ignored) == ("org/Model-1B", "[!1]*/*")
    assert {"config.json", "tokenizer.json", "model*.safetensors"} <= first
    assert "*.py" not in first
    assert first ^ second == {"model*.safetensors", "model.safetensors.index.json", "*.py"}


def test_hub_id_without_a_network_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(SourceError, match="hf download org/absent"):
        resolve("org/absent")


def test_the_bundled_model_is_the_default() -> None:
    source = resolve(None)
    assert source == replace(resolve("bundled"), config=source.config)
    assert source.name == "bundled"
    assert "tokenizer.json" in {f.name for f in source.tokenizer_files}
    assert len(source.eos_token_ids) == 2


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL).to_dict()

    def check(model: object, added: list[dict[str, object]]) -> None:
        check_vocabulary(resolve(str(write(tmp_path / "m", config=config, tokenizer={"model": model, "added_tokens": added}))))

    check({"vocab": {"a": 0, "z": 96}}, [{"id": 5, "content": "<s>", "special": True}])
    check({"vocab": [["a", 0.0]] * 97}, [])
    with pytest.raises(SourceError, match=r"tokenizer\.json has tokens that the model's vocabulary of 97 does not: 'z' \(97\), '<pad>' \(99\); use"):
        check({"vocab": {"a": 0, "z": 97}}, [{"id": 99, "content": "<pad>"}])
    with pytest.raises(SourceError, match="number 97"):
        check({"vocab": [["a", 0.0]] * 98}, [])
    with pytest.raises(SourceError, match="is no tokenizer"):
        check("what", [])
