"""Kernels chosen together: which calls are a layer's, and that another candidate is taken where the layer is faster with it, and no other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from ingot.compiler import layer
from ingot.compiler.layer import fastest_together, layer_of, near
from ingot.compiler.measure import MAX_COPIES, copies_of


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("e abc abc abc abc h", "abc"),
        ("e abc abd abc abd h", "abd"),  # a and b are in both kinds of layers
        ("abcbc", "bc"),
        ("abc", ""),
        ("", ""),
    ],
)
def test_a_layer_is_what_comes_again(names: str, found: str) -> None:
    calls = names.replace(" ", "")
    assert "".join(calls[i] for i in layer_of(calls)) == found


def test_what_was_much_slower_alone_is_not_tried() -> None:
    seconds = {"slow": 2.0, "c": 1.2, "a": 1.0, "b": 1.1, **{f"d{i}": 1.24 for i in range(5)}}
    assert near(seconds)[:3] == ["a", "b", "c"]
    assert len(near(seconds)) == layer.MOST
    assert "slow" not in near(seconds | dict.fromkeys([f"d{i}" for i in range(5)], 3.0))


def bound(name: str, situations: int = 1, copies: int = 1) -> list[list[Callable[[], str]]]:
    return [[lambda i=i, s=s: f"{name}{s}{i}" for i in range(copies)] for s in range(situations)]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], list[list[str]]]:
    """A clock on which a graph takes what its kernels take, by their first letters, and pairs so much more where one follows the other."""

    def use(seconds: dict[str, float]) -> list[list[str]]:
        graphs: list[list[str]] = []

        def graph_seconds(runs: list[Callable[[], str]]) -> float:
            names = [run() for run in runs]
            graphs.append(names)
            alone = sum(seconds[n[:-1]] if n[:-1] in seconds else seconds[n[0]] for n in names)
            return alone + sum(seconds.get(a[0] + b[0], 0.0) for a, b in pairwise(names))

        monkeypatch.setattr(layer, "graph_seconds", graph_seconds)
        return graphs

    return use


def test_the_fastest_alone_need_not_be_the_fastest_together(timed: Any) -> None:
    timed({"x": 1.0, "y": 1.1, "p": 2.0, "q": 2.05, "xp": 0.5, "xq": 0.5})
    runs = {"first": {"x": bound("x"), "y": bound("y")}, "second": {"p": bound("p"), "q": bound("q")}}
    assert fastest_together(["first", "second"], runs) == {"first": "y", "second": "p"}
    timed({"x": 1.0, "y": 0.999, "p": 2.0, "q": 2.05})
    assert fastest_together(["first", "second"], runs) == {"first": "x", "second": "p"}, "what is noise changes nothing"


def test_two_changes_that_only_together_need_two_rounds_are_found(timed: Any) -> None:
    timed({"x": 1.0, "y": 1.0, "p": 2.0, "q": 2.0, "xq": 1.0, "yq": -1.0, "xp": 0.0, "yp": -0.1})
    runs = {"first": {"x": bound("x"), "y": bound("y")}, "second": {"p": bound("p"), "q": bound("q")}}
    assert fastest_together(["first", "second"], runs) == {"first": "y", "second": "q"}


def test_layers_follow_each_other_on_copies_of_their_own_in_every_situation(timed: Any) -> None:
    graphs = timed({"x": 1.0, "a0": 1.0, "a1": 4.0, "b0": 3.0, "b1": 1.0})
    runs = {"product": {"x": bound("x", copies=3)}, "attention": {"a": bound("a", situations=2), "b": bound("b", situations=2)}}
    assert fastest_together(["product", "attention"], runs) == {"product": "x", "attention": "b"}  # √(4 · 2) < √(2 · 5)
    assert graphs[0] == [n for i in range(layer.LAYERS) for n in (f"x0{i % 3}", "a00")]
    assert graphs[1] == [n for i in range(layer.LAYERS) for n in (f"x0{i % 3}", "a10")]


@pytest.mark.parametrize(
    ("nbytes", "layers", "copies"),
    [(117 << 20, 1, 1), (117 << 20, 8, 7), (17 << 20, 1, 6), (1, 8, MAX_COPIES), (3 << 30, 8, 1), (300 << 20, 8, 4)],
)
def test_a_layer_has_memory_of_its_own_if_that_is_not_too_much(nbytes: int, layers: int, copies: int) -> None:
    assert copies_of(nbytes, 50 << 20, 80 << 30, layers) == copies
