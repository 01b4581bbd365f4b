"""`torch.compile(backend="ingot")` computes what eager mode does, through our passes and kernels."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ingot.compiler import torch_backend
from ingot.compiler.torch_backend import TorchBackendError
from ingot.ops import GraphError
from ingot.ops.graph import target_name

torch.set_num_threads(1)


class Layer(torch.nn.Module):
    """A decoder layer's feed-forward half, with what no dialect op covers around it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(24)
        self.gate, self.up, self.down = torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(40, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x * 1.5)
        return torch.tanh((x + self.down(F.silu(self.gate(h)) * self.up(h))) / 3) * 3


@pytest.fixture(autouse=True)
def fresh(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("INGOT_HOME", str(shared_home))
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every program that is compiled."""
    made: list[Any] = []
    compile_one = torch_backend._compile
    monkeypatch.setattr(torch_backend, "_compile", lambda *args: made.append(compile_one(*args)) or made[-1])
    return made


def test_a_layer_becomes_dialect_ops_and_regions_with_kernels(programs: list[Any]) -> None:
    layer = Layer()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    compiled = torch.compile(layer, backend="ingot")
    x = torch.randn(7, 24)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    (program,) = programs
    calls = [re.sub("region_.*", "region", target_name(n.target)) for n in program.graph.fx.nodes if n.op == "call_function"]
    assert calls == ["region", "ingot.linear_glu", "ingot.linear_add", "region"]
    assert len(program.runner.chosen) == 4
    regions = [choice.candidate.launches[0].source.backend for call, choice in program.runner.chosen.values() if call.region is not None]
    assert regions == ["tvm", "tvm"]


def test_other_shapes_are_compiled_when_they_come(programs: list[Any]) -> None:
    compiled = torch.compile(lambda x, w: (x @ w).softmax(-1) * 2, backend="ingot")
    w = torch.randn(24, 9)
    for tokens in (3, 17, 17):
        x = torch.randn(tokens, 24)
        torch.testing.assert_close(compiled(x, w), (x @ w).softmax(-1) * 2)
    shapes = [{i.shape for i in p.graph.inputs.values()} for p in programs]
    assert shapes == [{(3, 24), (24, 9)}, {(17, 24), (24, 9)}]


def test_changed_parameters_are_packed_again() -> None:
    layer = Layer()
    compiled = torch.compile(layer, backend="ingot")
    x = torch.randn(4, 24)
    before = compiled(x)
    layer.gate.weight.mul_(-2)
    after = compiled(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, layer(x), rtol=1e-5, atol=1e-5)


def test_results_of_every_kind() -> None:
    def fn(x: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = F.embedding(ids, table)
        top, where = (rows + x).topk(2)
        return x, rows[:, 1:3], top * 2, where, (rows > x).any(-1)

    x, ids, table = torch.randn(5, 8), torch.randint(0, 11, (5,)), torch.randn(11, 8)
    for a, b in zip(torch.compile(fn, backend="ingot")(x, ids, table), fn(x, ids, table), strict=True):
        assert torch.equal(a, b)


def test_columns_of_bfloat16_are_rounded_once() -> None:
    """The argument does not lie in rows; between the steps, nothing is rounded."""
    fn = lambda x: torch.tanh(x * 1.7) * 3 + x.mean(-1, keepdim=True)
    x = torch.randn(65, 33).bfloat16().t()[1:]
    torch.testing.assert_close(torch.compile(fn, backend="ingot")(x), fn(x.float()).bfloat16(), rtol=2**-7, atol=0)


def test_gradients_are_refused() -> None:
    compiled = torch.compile(Layer(), backend="ingot")
    with torch.enable_grad(), pytest.raises(TorchBackendError, match=r"torch\.no_grad"):
        compiled(torch.randn(3, 24))


def test_a_function_that_changes_its_argument_is_refused() -> None:
    x = torch.randn(3, 24)
    before = x.clone()
    with pytest.raises(GraphError, match="changes its argument"):
        torch.compile(lambda x: x.mul_(2), backend="ingot")(x)
    assert torch.equal(x, before)


def test_torch_finds_the_backend_by_its_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["torch_dynamo_backends"]["ingot"]
    assert EntryPoint("ingot", declared, "torch_dynamo_backends").load() is torch_backend.backend
