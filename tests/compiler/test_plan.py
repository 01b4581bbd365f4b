"""Where a plan puts values: what is alive is never overwritten, and a result may take the memory of an argument that nobody needs later."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ingot.artifacts.plan import Arg, Entry, Value, Variant
from ingot.compiler.from_function import from_function
from ingot.compiler.outline import Outline
from ingot.compiler.pipeline import lower
from ingot.compiler.plan import ALIGNMENT, Choice, place, plan
from ingot.compiler.select import candidates, load_families
from ingot.models import tiny
from ingot.models.frontend import trace
from ingot.ops import InputSpec, library
from ingot.ops.kernel import Call, Steps
from ingot.ops.target import Target
from ingot.runtime.bind import bind

CPU, SM_90 = Target("cpu", "x86-64:avx2+fma", ""), Target("cuda", "sm_90", "")
STEPS = Steps(max_tokens=64, max_seqs=4, max_num_new=64, max_rows=4, exact=False)
ingot = torch.ops.ingot


@st.composite
def programs(draw: st.DrawFn) -> tuple[dict[str, Value], list[Entry], tuple[str, ...], dict[str, str]]:
    """Values of a few shapes and views of them, entries that read some and write one, and for some results an argument to be overwritten."""
    values = {"x": Value("x", "float32", (64,), "input")}
    entries: list[Entry] = []
    inplace: dict[str, str] = {}
    for i in range(draw(st.integers(1, 12))):
        read = draw(st.lists(st.sampled_from(sorted(values)), max_size=3))
        out = values[f"v{i}"] = Value(f"v{i}", "float32", draw(st.sampled_from([(64,), (128,), ({"T": 1},), (1,)])), "arena")
        if draw(st.booleans()):  # a launch of the same call that makes scratch
            entries.append(Entry(out.name, "", "torch", (), (out.name,)))
        entries.append(Entry(out.name, "", "torch", tuple(Arg(value=n) for n in (out.name, *read)), (out.name,)))
        if read and draw(st.booleans()):
            inplace[out.name] = draw(st.sampled_from(read))
        if out.shape == (128,) and draw(st.booleans()):
            values[f"view{i}"] = Value(f"view{i}", "float32", (64,), out.storage, root=out.name, strides=draw(st.sampled_from([None, (2,)])))
    return values, entries, tuple(draw(st.lists(st.sampled_from([e.node for e in entries]), max_size=2))), inplace


@given(programs())
def test_what_is_alive_is_never_overwritten(program: tuple[dict[str, Value], list[Entry], tuple[str, ...], dict[str, str]]) -> None:
    values, entries, results, inplace = program
    placed, nbytes = place(dict(values), entries, results, STEPS, inplace)
    held = [""] * (nbytes // ALIGNMENT)  # what was written there last

    def memory(name: str) -> tuple[str, range]:
        root = placed[placed[name].root or name]
        begin = root.arena_offset // ALIGNMENT
        return root.name, range(begin, begin + (2 if root.shape == (128,) else 1))

    for entry in entries:
        if not entry.args:
            continue
        read = [memory(a.value) for a in entry.args[1:] if a.value != "x"]
        assert all(held[i] == root for root, where in read for i in where)
        name, where = memory(entry.node)
        overwritten = [root for root, other in read if set(other) & set(where)]
        assert overwritten == [memory(inplace[name])[0]] if overwritten else True
        held[where.start : where.stop] = [name] * len(where)
    assert all(held[i] == name for name, where in map(memory, results) for i in where)


WEIGHTS = {"w": (torch.float32, (16, 16)), "b": (torch.float32, (16,))}
X = {"x": InputSpec(torch.float32, ("T", 16))}


def add(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    return ingot.linear_add(x, w, b, residual)


def again(x, w, b):
    h = x * 2
    for _ in range(3):
        h = add(x, w, h, b)
    return [h]


def reshaped(x, w, b):
    return [add(x, w, (x * 2).reshape(-1, 4, 4).abs().reshape(-1, 16))]


def wider(x, w, b):
    return [add(x, w, torch.cat([x, x]).relu()[: x.shape[0]])]


def columns(x, w, b):
    h = torch.cat([x, x + 1], 1)
    return [add(h[:, :16], w, h[:, 16:])]  # both are copied to where rows are contiguous


def needed_later(x, w, b):
    h = x * 2
    return [add(x, w, h) + h]


def needed_as_a_view(x, w, b):
    h = x * 2
    part = h[:, 8:]
    return [add(x, w, h), part + 1]


def returned(x, w, b):
    h = x * 2
    return [h, add(x, w, h)]


def read_twice(x, w, b):
    h = x * 2
    return [add(h, w, h)]


def read_as_a_view(x, w, b):
    h = torch.cat([x, x * 2])
    return [add(h[x.shape[0] :], w, h[: x.shape[0]])]


def an_input(x, w, b):
    return [add(x * 2, w, x)]


@pytest.mark.parametrize(("fn", "shared"), [(again, 3), (reshaped, 1), (wider, 1), (columns, 1), (needed_later, 0), (needed_as_a_view, 0), (returned, 0),
                                            (read_twice, 0), (read_as_a_view, 0), (an_input, 0)])  # fmt: skip
def test_products_with_a_residual_in_place_compute_the_same(fn: Callable[..., list[torch.Tensor]], shared: int) -> None:
    graph = from_function(fn, X, weights=WEIGHTS)

    def choose(call: Call) -> Choice:
        found = library.linear_add(call, STEPS, CPU)[0] if call.op == "linear_add" else None
        return Choice(found, () if found is None else tuple(launch.source.symbol for launch in found.launches), "")

    variant = plan(Outline.of(graph), STEPS, "tokens_64", choose)
    products = [e for e in variant.entries if e.kernel == "addmm"]
    assert sum(_in_place(e, variant) for e in products) == shared
    generator = torch.Generator().manual_seed(0)
    roots = {n: torch.randn(shape, generator=generator) for n, shape in {"x": (7, 16), "w": (16, 16), "b": (16,)}.items()}
    arena = torch.full((variant.arena_bytes,), 0xFF, dtype=torch.uint8)  # NaN
    bound = bind(variant, {"T": 7, "S": 1, "R": 1}, {n: t.clone() for n, t in roots.items()}, arena, {}, torch.device("cpu"))
    expected, _ = graph.run(roots)
    for _ in range(2):
        bound.run()
        for actual, wanted in zip(bound.results, expected, strict=True):
            torch.testing.assert_close(actual, wanted)


def _in_place(entry: Entry, variant: Variant) -> bool:
    """Whether an `addmm` writes where its addend is."""
    values = {v.name: v for v in variant.values}
    out, *_, addend = (values[a.value] for a in entry.args if a.value is not None)
    addend = values[addend.root] if addend.root else addend
    return addend.storage == "arena" and addend.arena_offset == out.arena_offset


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_residual_of_a_prefill_stays_in_one_place(model_type: str) -> None:
    load_families(SM_90)
    graph, _ = lower(trace(tiny.config(model_type), dtype=torch.bfloat16, page_size=64), SM_90)
    steps = Steps(8192, 256, 8192, 512, False, 64)

    def choose(call: Call) -> Choice:
        found = next((c for c in candidates(call, steps, SM_90) if c.name == "library"), None)
        return Choice(found, () if found is None else tuple(launch.source.symbol for launch in found.launches), "")

    variant = plan(Outline.of(graph), steps, "tokens_8192", choose)
    products = [e for e in variant.entries if e.kernel == "addmm" and e.target == "ingot.linear_add"]
    assert len(products) == 4 and all(_in_place(e, variant) for e in products)
