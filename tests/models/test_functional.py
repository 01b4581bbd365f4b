"""Ops in place become pure without changing what is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ingot.models import functional as module
from ingot.models.functional import functional


def normalize(x: torch.Tensor) -> torch.Tensor:
    top, ids = torch.topk(x.softmax(-1), 3, -1)
    top /= top.sum(-1, keepdim=True)
    return top * ids


def twice(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    before = y.cos()
    y.add_(1).mul_(y)
    return before + y


def through_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 1:4].mul_(3)
    return y


def seen_through_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    first = y.view(-1)
    y.add_(1)
    return first * 5


def rounded_back(x: torch.Tensor) -> torch.Tensor:
    y = (x * 2).bfloat16().clone()
    y *= x
    return y.float() + x


@pytest.mark.parametrize(
    ("fn", "recorded_again"), [(normalize, False), (twice, False), (through_a_view, True), (seen_through_a_view, True), (rounded_back, True)]
)
def test_pure_and_equal(fn: Callable[[torch.Tensor], torch.Tensor], recorded_again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    again: list[None] = []
    monkeypatch.setattr(module, "make_fx", lambda *a, **k: again.append(None) or make_fx(*a, **k))
    with torch.no_grad():
        pure = functional(make_fx(fn, pre_dispatch=True)(x), [x])
    assert not [n for n in pure.graph.nodes if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable], pure.graph
    assert bool(again) == recorded_again
    torch.testing.assert_close(pure(x), fn(x), rtol=0, atol=0)
