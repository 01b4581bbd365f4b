"""What is recorded without being computed is what computing it records."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ingot.models import frontend, tiny
from ingot.models.alike import Alike
from ingot.models.swaps import Patch, patched


class Never(Alike):
    """Computes every call."""

    @property
    def patch(self) -> Patch:
        return Patch(proxy_tensor.ProxyTorchDispatchMode, "__torch_dispatch__", proxy_tensor.ProxyTorchDispatchMode.__torch_dispatch__)


def layers(x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = torch.nn.functional.silu(x @ x.transpose(0, 1)) @ x
        first, second = x.contiguous().chunk(2, -1)
        x = torch.cat([second.float().to(x.dtype) * 2, first], -1)
    return x


def in_place(x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        y = x.clone()
        y[:, :2].mul_(3)
        y.unsqueeze_(0)
        x = y.squeeze(0) + x
    return x


def values(x: torch.Tensor) -> torch.Tensor:
    for i in range(3):
        x = x * torch.tensor(i).add(1).item() + torch.arange(x.shape[0], device=x.device)[:, None] * torch.tensor(float(i))
    return x


def sizes(x: torch.Tensor) -> torch.Tensor:
    for n in (1, 2, 2, 1):
        x = x.reshape(x.shape[0], 2 * n, -1).reshape(-1, 8) * (x.shape[0] + n)
    return x


def record(function: Callable[[torch.Tensor], torch.Tensor], kind: type[Alike]) -> list[str]:
    made = frontend.Sizes()
    x = made.empty(("T", 8), torch.bfloat16)
    with torch.no_grad(), made.mode, patched([kind(made.mode).patch]):
        graph = make_fx(function, tracing_mode="real", pre_dispatch=True)(x).graph
    return [f"{node.format_node()} {_type(node)}" for node in graph.nodes]


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype} {value.shape} {value.stride()}" if isinstance(value, torch.Tensor) else str(value)


@pytest.mark.parametrize("function", [layers, in_place, values, sizes])
def test_the_same_nodes_are_recorded(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert record(function, Alike) == record(function, Never)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral", "mamba2", "deepseek_v3"])
def test_the_same_model_is_traced(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = lambda: str(frontend.trace(tiny.config(model_type), dtype=torch.bfloat16))
    quick = trace()
    monkeypatch.setattr(frontend, "Alike", Never)
    assert trace() == quick


def test_layers_that_are_alike_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    compute = proxy_tensor.proxy_call
    monkeypatch.setattr(proxy_tensor, "proxy_call", lambda mode, func, *rest: (computed.append(func), compute(mode, func, *rest))[1])
    frontend.trace(tiny.config("llama", num_hidden_layers=2), dtype=torch.bfloat16)
    few = len(computed)
    frontend.trace(tiny.config("llama", num_hidden_layers=6), dtype=torch.bfloat16)
    assert len(computed) - few < few + 8
