"""Views compose, cancel and sink without changing a number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ingot.compiler.from_function import from_function
from ingot.compiler.passes.clean_views import clean_views
from ingot.ops import InputSpec
from ingot.ops.graph import target_name
from ingot.ops.target import Target

F = torch.nn.functional


def heads_and_back(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x.reshape(-1, 6, 4).transpose(0, 1)).transpose(0, 1).reshape(-1, 24)


def split_and_cat(x: torch.Tensor) -> torch.Tensor:
    a, b = x.reshape(-1, 6, 4).transpose(0, 1).split([3, 1], -1)
    return torch.cat([b * 2, a], -1).transpose(0, 1).reshape(-1, 24)


def norm_under_a_transpose(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.ingot.rms_norm(x.reshape(-1, 6, 4).transpose(0, 1), None, 1e-6).permute(1, 0, 2).reshape(-1, 24)


def one_head_shared(x: torch.Tensor) -> torch.Tensor:
    heads, shared = x[:, :20].reshape(-1, 5, 4).transpose(0, 1), x[:, 20:].reshape(-1, 1, 4).transpose(0, 1)
    return torch.cat([heads, shared.expand(5, -1, -1)], 2).transpose(0, 1).reshape(-1, 40)


def reshapes_of_reshapes(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(0).reshape(1, -1, 2, 12).flatten(0, 1).unflatten(-1, (3, 4)).reshape(-1, 24)[:, 0:24] + 1


def order_that_matters(x: torch.Tensor) -> torch.Tensor:
    """Elements do move here: a permute must stay."""
    return x.reshape(-1, 6, 4).transpose(1, 2).reshape(-1, 24)


def norm_over_the_moved_dim(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.ingot.rms_norm(x.reshape(-1, 6, 4).transpose(1, 2), None, 1e-6).transpose(1, 2).reshape(-1, 24)


def broadcast_over_the_moved_dim(x: torch.Tensor) -> torch.Tensor:
    return (x.reshape(-1, 6, 4).transpose(1, 2) * torch.ops.aten.arange.default(6)).transpose(1, 2).reshape(-1, 24)


@pytest.mark.parametrize(
    ("fn", "permutes"),
    [
        (heads_and_back, 0),
        (split_and_cat, 0),
        (norm_under_a_transpose, 0),
        (one_head_shared, 0),
        (reshapes_of_reshapes, 0),
        (order_that_matters, 1),
        (norm_over_the_moved_dim, 2),
        (broadcast_over_the_moved_dim, 2),
    ],
    ids=lambda p: p.__name__ if callable(p) else str(p),
)
def test_same_numbers_with_fewer_views(fn: Callable[[torch.Tensor], torch.Tensor], permutes: int) -> None:
    graph = from_function(lambda x: [fn(x)], {"x": InputSpec(torch.float32, ("T", 24))})
    clean = clean_views(graph, Target("cpu", "x86-64:", ""))
    clean.verify()
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(clean.run({"x": x})[0][0], fn(x), rtol=1e-6, atol=1e-6)
    calls = [target_name(n.target) for n in clean.fx.nodes if n.op == "call_function"]
    assert sum("permute" in c or "transpose" in c for c in calls) == permutes, f"{clean}"
    assert not [c for c in calls if "squeeze" in c or ("slice" in c and fn is reshapes_of_reshapes)]


@pytest.mark.parametrize(("begin", "end", "slices"), [(0, 16, 0), (16, 24, 0), (0, 8, 1), (16, 20, 1), (8, 24, 1)])
def test_a_part_of_a_cat_is_that_part(begin: int, end: int, slices: int) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x[:, :16] * 2, x[:, 16:] + 1], -1)
        return both[:, begin:end] * both.sum(-1, keepdim=True)

    graph = from_function(lambda x: [fn(x)], {"x": InputSpec(torch.float32, ("T", 24))})
    clean = clean_views(graph, Target("cpu", "x86-64:", ""))
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(clean.run({"x": x})[0][0], fn(x))
    assert sum(n.target is torch.ops.aten.slice.Tensor for n in clean.fx.nodes) == 2 + slices
