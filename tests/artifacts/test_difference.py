"""`ingot inspect --why`: what differs between two keys, spelled out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ingot.artifacts.artifact import Artifact, ArtifactWriter
from ingot.artifacts.difference import differences
from ingot.ops.graph import Recipe
from ingot.serve.cli import app

INPUTS = {"model": "tiny", "config": "1", "generation_config": "1", "checkpoint": "1", "tokenizer": "1", "target": "cpu/x86-64:avx2+fma", "options": "{}",
          "compiler": "1 torch 2.13"}  # fmt: skip
CONFIG = {"model_type": "llama", "hidden_size": 64, "rope": {"theta": 1.0}}
LONG = {"generation_config": {"top_k": 20}, "compiler": {"torch": "2.13", "compiler/plan.py": "aa"}}
Make = Callable[..., Artifact]


@pytest.fixture
def make(builder: SimpleNamespace, tmp_path: Path) -> Make:
    """An artifact with some of these inputs changed."""
    like = builder.write(ArtifactWriter(tmp_path / "like"), "like")

    def call(key: str, inputs: dict[str, str] | None = None, config: Any = CONFIG, long: Any = LONG, tokenizer: str = "{}", value: float = 1.0,
             width: int = 3) -> Artifact:  # fmt: skip
        writer = ArtifactWriter(tmp_path / key)
        writer.add_file("config.json", json.dumps(config).encode())
        writer.add_file("inputs.json", json.dumps(long).encode())
        writer.add_file("tokenizer/tokenizer.json", tokenizer.encode())
        writer.weights().add("first", torch.ones(5, 3), Recipe("tensor", ("a",)))
        writer.weights().add("second", torch.full((7, width), value), Recipe("tensor", ("b",)))
        fields = {n: getattr(like, n) for n in ("target", "model", "options", "groups", "states", "report")}
        writer.finish(key=key, key_inputs=INPUTS | (inputs or {}), **fields)
        return Artifact.open(tmp_path / key)

    return call


def test_every_input_is_spelled_out(make: Make) -> None:
    a = make("a", {"options": '{"dtype": "float32", "max_num_seqs": 4}'})
    b = make(
        "b",
        {"options": '{"dtype": "float32", "max_num_seqs": 8}', "config": "2", "generation_config": "2", "checkpoint": "2", "tokenizer": "2", "compiler": "2",
         "target": "cuda/sm_90"},
        config={"model_type": "llama", "hidden_size": 96, "rope": {"theta": 2.0}, "new": True},
        long={"generation_config": {}, "compiler": {"torch": "2.13", "compiler/plan.py": "bb"}},
        tokenizer="{ }",
        value=2.0,
    )  # fmt: skip
    found = differences(a, b)
    assert found["options"] == ["max_num_seqs: 4 → 8"]
    assert found["config"] == ["hidden_size: 64 → 96", "new: only in the second, true", "rope.theta: 1.0 → 2.0"]
    assert found["generation_config"] == ["top_k: only in the first, 20"]
    assert found["compiler"] == ['compiler/plan.py: "aa" → "bb"']
    assert found["target"] == ["cpu/x86-64:avx2+fma → cuda/sm_90"]
    assert found["checkpoint"] == ["values of some of 2 weights: first, second"]
    assert found["tokenizer"][0].startswith('tokenizer/tokenizer.json: "')
    assert "model" not in found


def test_weights_of_another_kind(make: Make) -> None:
    assert differences(make("a"), make("b", {"checkpoint": "2"}, width=4)) == {"checkpoint": ['second: "float32 [7, 3]" → "float32 [7, 4]"']}


def test_the_same_key_with_other_content(make: Make, tmp_path: Path) -> None:
    a = make("same")
    a.root.rename(tmp_path / "first")
    first, second = Artifact.open(tmp_path / "first"), make("same", value=5.0, tokenizer="{ }")
    assert differences(first, first) == {}
    assert [line.partition(":")[0] for line in differences(first, second)["content"]] == ["tokenizer/tokenizer.json", "values of some of 2 weights"]


def test_the_command(make: Make) -> None:
    a, b = (str(make(k, {"model": k}).root) for k in "ab")
    run = CliRunner().invoke
    assert run(app, ["inspect", "--why", a, b]).stdout == "model: a → b\n"
    assert run(app, ["inspect", "--why", a, a]).stdout == "nothing differs\n"
    assert json.loads(run(app, ["inspect", "--why", "--json", a, b]).stdout) == {"model": ["a → b"]}
    for wrong in (["inspect", a, b], ["inspect", "--why", a]):
        assert run(app, wrong).exit_code == 2
