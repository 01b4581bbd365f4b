"""The command line on the fake artifact: shapes, exit codes, messages. What needs a real model is in test_end_to_end.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def ingot(tmp_path: Path) -> Run:
    """Run the command line with a store of its own."""

    def run(*args: object, home: Path = tmp_path / "home") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ingot.serve.cli", *map(str, args)]
        return subprocess.run(command, env=os.environ | {"INGOT_HOME": str(home)}, capture_output=True, text=True, timeout=120)

    return run


def test_help_is_instant_and_names_every_verb(ingot: Run) -> None:
    done = ingot("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("compile", "inspect", "models", "generate", "serve", "bench", "artifacts"))
    # half a second is what the imports decide, and unlike a clock they are the same on a busy machine
    heavy = "torch transformers numpy fastapi uvicorn triton tvm"
    probe = f"import sys, ingot.serve.cli; print(*(m for m in '{heavy}'.split() if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        (("compile",), "--target --dtype --quantize --kv-cache-dtype --max-num-seqs --max-num-batched-tokens --deterministic --dummy-weights --output --json"),
        (("inspect",), "--json"),
        (("models",), "--run --json"),
        (
            ("generate",),
            "--prompt --prompt-ids --max-tokens --temperature --seed --logprobs --prompt-logprobs --ignore-eos --json --dtype --dummy-weights "
            "--top-k --top-p --min-p --stop --min-tokens --repetition-penalty --presence-penalty --frequency-penalty --logit-bias --bad-word "
            "--allowed-token-ids --best-of --beam-width --length-penalty --early-stopping",
        ),
        (("serve",), "--host --port --api-key --max-model-len --gpu-memory-utilization --target --max-num-seqs"),
        (("bench", "latency"), "--batch --prefill --repeats --json --dummy-weights"),
        (("bench", "throughput"), "--requests --json --dummy-weights"),
        (("bench", "startup"), "--repeats --server --json --dummy-weights"),
        (("bench", "serve"), "--model --requests --rate --concurrency --prompt-tokens --output-tokens --prompts --chat --seed --json"),
    ],
)
def test_flags_are_the_contract(verb: tuple[str, ...], flags: str) -> None:
    import typer

    from ingot.serve.cli import app

    command = typer.main.get_command(app)
    for name in verb:
        command = command.commands[name]  # type: ignore[attr-defined]
    options = {o for p in command.params for o in p.opts}
    assert set(flags.split()) <= options


def test_inspect_tells_an_artifact(ingot: Run, artifact: Path) -> None:
    shown = json.loads(ingot("inspect", artifact, "--json").stdout)
    assert shown["model"]["num_parameters"] == 12_345_678
    assert shown["kv_bytes_per_token"] == 1024
    assert shown["report"]["nodes"] == [["traced", 17], ["fuse", 9]]
    assert shown["size_bytes"] == sum(f.stat().st_size for f in artifact.rglob("*") if f.is_file())
    text = ingot("inspect", artifact).stdout
    assert "12.3 M parameters" in text
    assert "traced 17 → fuse 9" in text
    assert "1,024 bytes a token" in text


def test_an_error_is_one_message_and_exit_code_1(ingot: Run, artifact: Path, tmp_path: Path) -> None:
    for args, message in (
        (("inspect", tmp_path), "neither the folder of an artifact nor the key"),
        (("serve", artifact, "--dtype", "float32"), "is an artifact, compiled already: --dtype float32 cannot change it"),
        (("generate", tmp_path, "--prompt", "x"), "config.json"),
        (("artifacts", "import", tmp_path / "nothing.tar"), "nothing.tar"),
    ):
        done = ingot(*args)
        assert done.returncode == 1, done
        assert message in done.stderr
        assert "ingot: " in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_where_a_start_spends_its_seconds_is_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, artifact: Path) -> None:
    from ingot.serve.bench import startup
    from ingot.serve.cli import app

    measured = {"seconds": {"ready": 2.0}, "stages": {"python": 0.5, "import torch": 1.5, "load kernels": 0.001}, "weights_gb_per_s": 0.25}
    monkeypatch.setattr(startup, "run", lambda *args: dict(measured))
    app(["bench", "startup", str(artifact)], standalone_mode=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["python", "0.50", "25%"] in lines and ["import", "torch", "1.50", "75%"] in lines
    assert ["weights_gb_per_s:", "0.250"] in lines and not any("kernels" in line for line in lines)
    app(["bench", "startup", str(artifact), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == measured


def test_a_taken_port_is_told(ingot: Run, artifact: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = ingot("serve", artifact, "--port", taken.getsockname()[1])
    assert done.returncode == 1
    assert "choose others with --host and --port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("serve",),
        ("generate", "x"),
        ("generate", "x", "--prompt", "a", "--prompt-ids", "1"),
        ("generate", "x", "--prompt-ids", "1,b"),
        ("generate", "x", "--prompt", "a", "--max-tokens", "0"),
        ("generate", "x", "--prompt", "a", "--logit-bias", "5"),
        ("generate", "x", "--prompt", "a", "--allowed-token-ids", "1;2"),
        ("compile", "x", "--max-num-seqs", "0"),
        ("bench", "latency", "x", "--batch", "1,-4"),
        ("bench", "throughput", "x", "--shortest", "9", "--longest", "8"),
        ("bench", "serve", "127.0.0.1:8000"),
        ("models", "LlamaForCausalLM"),
        ("nothing",),
    ],
)
def test_wrong_usage_is_exit_code_2(args: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot.serve import cli

    monkeypatch.setattr(sys, "argv", ["ingot", *args])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err


def test_the_store_lists_exports_imports_verifies_and_removes(ingot: Run, artifact: Path, tmp_path: Path) -> None:
    key, tar = "fa" * 32, tmp_path / "a.tar"
    assert ingot("artifacts", "export", artifact, tar).returncode == 0
    assert ingot("artifacts", "import", tar).stdout.strip() == str(tmp_path / "home" / "artifacts" / key)
    (listed,) = json.loads(ingot("artifacts", "list", "--json").stdout)
    assert (listed["key"], listed["model"], listed["problem"]) == (key, "fake", None)
    assert json.loads(ingot("inspect", key[:12], "--json").stdout)["key"] == key
    assert ingot("artifacts", "verify").stdout == f"{key}: good\n"
    config = Path(listed["path"]) / "tokenizer" / "tokenizer_config.json"
    config.chmod(0o644)
    config.write_bytes(config.read_bytes().replace(b"assistant", b"assistent"))
    damaged = ingot("artifacts", "verify", key)
    assert damaged.returncode == 1
    assert "tokenizer_config.json" in damaged.stdout
    assert "damaged" in ingot("artifacts", "list").stdout
    assert ingot("artifacts", "remove", key).returncode == 0
    assert json.loads(ingot("artifacts", "gc", "--json").stdout)["blobs"] > 0
    assert json.loads(ingot("artifacts", "list", "--json").stdout) == []


def test_models_lists_what_the_oracle_found(ingot: Run) -> None:
    verdicts = json.loads(ingot("models", "--json").stdout)
    assert {frozenset(v) for v in verdicts} == {frozenset({"architecture", "model_type", "entry_point", "admitted", "reason"})}
    by_name = {v["architecture"]: v for v in verdicts}
    assert by_name["LlamaForCausalLM"]["admitted"]
    assert all(v["reason"] for v in verdicts if not v["admitted"])


@pytest.mark.nightly
def test_export_writes_onnx(ingot: Run, tmp_path: Path) -> None:
    done = ingot("export", "--onnx", "bundled", "-o", tmp_path / "model.onnx")
    assert done.returncode == 0, done.stderr
    onnx.checker.check_model(tmp_path / "model.onnx")
    assert "say --onnx" in ingot("export", "bundled").stderr
