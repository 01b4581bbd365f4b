"""Floors: the formulas against sums written out, and the reading of a plan against a model's configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ingot.artifacts.manifest import Group, State, WeightTensor
from ingot.artifacts.plan import Arg, Entry, Value
from ingot.serve.bench.floor import Attention, Floor, Product, _costs, _gathered
from ingot.serve.bench.rates import Rates, measure

H200 = Rates(4.54e12, 650e12, "known")


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize(("cached", "new"), [(0, 1), (0, 7), (3, 4), (5, 1), (9, 6), (90, 30)])
def test_pairs_and_keys(window: int, cached: int, new: int) -> None:
    site = Attention(1.0, 1, window)
    seen = [set(range(max(0, p + 1 - window) if window else 0, p + 1)) for p in range(cached, cached + new)]
    assert site.pairs(cached, new) == sum(map(len, seen))
    assert site.keys(cached, new) == len(set().union(*seen))


def llama(layers: int, D: int, inner: int, H: int, K: int, E: int, V: int) -> Floor:
    matrices = [layers * (H + 2 * K) * E * D, layers * H * E * D, layers * 3 * D * inner]
    products = (*(Product({"T": 1}, n, 2 * n) for n in matrices), Product({"R": 1}, V * D, 2 * V * D))
    return Floor(H200, products, (Attention(layers * 4.0 * H * E, layers * 2 * K * E * 2, 0),), 0)


@pytest.mark.parametrize(
    ("floor", "batch_1", "batch_256", "prefill", "mixed"),
    [
        (llama(28, 1024, 3072, 16, 8, 128, 151936), 0.26, 1.56, 22.9, 35_000),
        (llama(16, 2048, 8192, 32, 8, 64, 128256), 0.55, 1.28, 31.3, 72_000),
        (llama(32, 4096, 14336, 32, 8, 128, 128256), 3.31, 7.15, 203, 12_900),
    ],
)
def test_the_models_of_the_tables(floor: Floor, batch_1: float, batch_256: float, prefill: float, mixed: float) -> None:
    """Milliseconds and tokens a second as they follow from the configurations by hand."""
    assert floor.decode(1, 1) * 1e3 == pytest.approx(batch_1, rel=0.02)
    assert floor.decode(256, 168) * 1e3 == pytest.approx(batch_256, rel=0.01)
    assert floor.prefill(8192) * 1e3 == pytest.approx(prefill, rel=0.01)
    lengths = np.random.default_rng(0).integers(100, 1024, (256, 2), endpoint=True)
    assert lengths[:, 1].sum() / floor.load(*lengths.T.tolist()) == pytest.approx(mixed, rel=0.05)


def test_a_load_is_its_steps() -> None:
    floor = llama(2, 64, 128, 4, 2, 16, 100)
    steps = [floor.seconds([0, 0, 0], [5, 3, 8]), floor.seconds([5, 8], [1, 1]), floor.seconds([6], [1])]
    assert floor.load([5, 3, 8], [3, 1, 2]) == pytest.approx(sum(steps))


def test_recurrent_states_are_read_and_written() -> None:
    floor = Floor(Rates(1e9, 1e15, "known"), (), (), 0, state_bytes=1000)
    assert floor.seconds([3, 0], [1, 5]) == pytest.approx(3000 / 1e9)


def test_experts_are_read_as_far_as_tokens_choose_them() -> None:
    product = Product({"T": 2}, 8 * 100, 1600, experts=8, active=2)
    assert product.flops(2) == 2 * 2 * 100  # each row meets one expert's matrix
    assert product.read(2) == pytest.approx(2 * 1600 / 8)  # of one token
    assert product.read(4) == pytest.approx(1600 * (1 - (6 / 8) ** 2))
    assert product.read(1000) == pytest.approx(1600)


def test_a_mixture_of_experts_by_hand() -> None:
    """Mixtral 8x7B, bfloat16: a token reads two experts of eight and all of attention; a long prompt reads everything, and computes with two."""
    D, inner, layers, V = 4096, 14336, 32, 32000
    dense, experts = layers * (32 + 16 + 32) * 128 * D, layers * 8 * 3 * D * inner
    products = (Product({"T": 1}, dense, 2 * dense), Product({"T": 2}, experts, 2 * experts, 8, 2), Product({"R": 1}, V * D, 2 * V * D))
    floor = Floor(H200, products, (Attention(layers * 4.0 * 32 * 128, layers * 2 * 8 * 128 * 2, 0),), 0)
    assert floor.decode(1, 1) == pytest.approx(2 * (dense + experts / 4 + V * D) / 4.54e12, rel=1e-3)
    assert floor.decode(64, 1) == pytest.approx(2 * (dense + experts + V * D) / 4.54e12, rel=1e-3)
    attention = layers * 4 * 32 * 128 * 8192**2 / 2
    assert floor.prefill(8192) == pytest.approx((2 * 8192 * (dense + experts / 4) + attention) / 650e12, rel=1e-3)


class _Read:
    """A plan and a manifest that have what the floor reads of them."""

    def __init__(self, values: tuple[Value, ...], entries: tuple[Entry, ...], states: tuple[State, ...], group: Group) -> None:
        self.values, self.entries, self.states, self.groups = values, entries, states, (group,)
        self.report: dict[str, Any] = {}
        self.weights = tuple(WeightTensor(v.name, v.dtype, v.shape, 0, 0, []) for v in values if v.storage == "weight")  # type: ignore[arg-type]

    def costs(self) -> Any:
        return _costs(self, self)  # type: ignore[arg-type]


def entry(node: str, target: str, args: str, outputs: str) -> Entry:
    return Entry(node, target, "triton", tuple(Arg(value=a) for a in args.split()), tuple(outputs.split()))


def test_a_plan_with_latents_is_read() -> None:
    """Every head has a weight of its own; a cached row is key and value; of a list, so many rows are read, after scores of all by the indexer."""
    t = {"T": 1}
    values = (
        Value("q", "bfloat16", (t, 4, 8), "arena"), Value("up", "bfloat16", (4, 16, 8), "weight"), Value("ql", "bfloat16", (t, 4, 16), "arena"),
        Value("qr", "bfloat16", (t, 4, 6), "arena"), Value("l", "bfloat16", ({"N_l": 1}, 1, 64, 22), "state"), Value("slots", "int32", (t,), "input"),
        Value("i", "bfloat16", ({"N_l": 1}, 1, 64, 12), "state"), Value("qi", "bfloat16", (t, 3, 12), "arena"), Value("list", "int32", (t, 7), "arena"),
        Value("table", "int32", ({"S": 1}, {"P_l": 1}), "input"), Value("o", "bfloat16", (t, 4, 16), "arena"), Value("part", "float32", (t, 9), "arena"),
        Value("o2", "bfloat16", (t, 4, 16), "arena"),
    )  # fmt: skip
    entries = (
        entry("u", "ingot.head_linear", "q up ql", "ql"), entry("w", "ingot.latent_write", "ql qr l slots", ""),
        entry("a", "ingot.mla_attention", "ql qr l table part", "o part"), entry("a", "ingot.mla_attention", "part o", "o part"),
        entry("x", "ingot.sparse_index", "qi i table list", "list"), entry("b", "ingot.mla_attention", "ql qr l table list o2", "o2"),
    )  # fmt: skip
    states = (State("l", "latent", "bfloat16", (1, 64, 22)), State("i", "latent", "bfloat16", (1, 64, 12)))
    products, attention, other = _Read(values, entries, states, Group("latent", "page", 64, 4096, 0)).costs()
    assert (products, other) == ((Product(t, 4 * 16 * 8, 1024),), 0)
    whole, listed = 2.0 * 4 * (22 + 16), Attention(2.0 * 4 * (22 + 16), 44, 7)
    assert attention == (Attention(whole + 2.0 * 3 * 12, 44 + 24, 0), listed)


def test_a_plan_is_read() -> None:
    """A linear in two launches, experts, a windowed attention, a norm; embedding rows and cache writes cost nothing."""
    t, page = {"T": 1}, ({"N_w": 1}, 2, 16, 4)
    values = (
        Value("ids", "int32", (t,), "input"), Value("table", "bfloat16", (50, 8), "weight"), Value("x", "bfloat16", (t, 8), "arena"),
        Value("w", "bfloat16", (12, 8), "weight"), Value("y", "bfloat16", (t, 12), "arena"), Value("part", "float32", (t, 24), "arena"),
        Value("norm", "bfloat16", (8,), "weight"), Value("k", "bfloat16", page, "state"), Value("v", "bfloat16", page, "state"),
        Value("q", "bfloat16", (t, 6, 4), "arena"), Value("o", "bfloat16", (t, 6, 4), "arena"), Value("top", "int64", (t, 2), "arena"),
        Value("experts", "bfloat16", (4, 10, 8), "weight"), Value("z", "bfloat16", (t, 10), "arena"), Value("order", "int32", ({"T": 2, "": 9},), "arena"),
        Value("bias", "bfloat16", (4, 10), "weight"),
    )  # fmt: skip

    entries = (
        entry("e", "ingot.embedding", "ids table x", "x"), entry("n", "ingot.rms_norm", "x norm x", "x"),
        entry("l", "ingot.linear", "x w part", "y part"), entry("l", "ingot.linear", "part y", "y part"),
        entry("r", "ingot.qkv_rope_kv_write", "y k v q", "q"), entry("a", "ingot.paged_attention", "q k v o", "o"),
        entry("m", "ingot.moe", "order top", "order z"), entry("m", "ingot.moe", "x order experts bias z", "order z"),
    )  # fmt: skip

    states = tuple(State(n, "window9", "bfloat16", (2, 16, 4)) for n in "kv")
    products, attention, other = _Read(values, entries, states, Group("window9", "page", 16, 512, 9)).costs()
    assert products == (Product({"T": 1}, 96, 192), Product({"T": 2}, 320, 640, experts=4, active=2))
    assert attention == (Attention(2.0 * 6 * (4 + 4), 2 * 2 * 4 * 2, 9),)
    assert other == 16 + 80


def test_what_prompts_multiply_by_rows_of_logits_alone() -> None:
    """The last layer's product in prompts, here in two launches, and not one that has all rows in them."""
    t, r = {"T": 1}, {"R": 1}
    weights = (Value("w", "bfloat16", (12, 8), "weight"), Value("last", "bfloat16", (8, 12), "weight"))

    def plan(rows: dict[str, int]) -> _Read:
        values = (Value("x", "bfloat16", (t, 8), "arena"), Value("y", "bfloat16", (t, 12), "arena"), Value("g", "bfloat16", (rows, 12), "arena"),
                  Value("part", "float32", (dict.fromkeys(rows, 2), 8), "arena"), Value("z", "bfloat16", (rows, 8), "arena"))  # fmt: skip
        entries = (entry("l", "ingot.linear", "x w y", "y"), entry("g", "ingot.gather_rows", "y g", "g"), entry("m", "ingot.linear", "g last part", "z part"),
                   entry("m", "ingot.linear", "part z", "z"))  # fmt: skip
        return _Read(values + weights, entries, (), Group("full", "page", 16, 512, 0))

    decode = plan(t)
    products, _, _ = _costs(decode, decode, _gathered(plan(r)))  # type: ignore[arg-type]
    assert products == (Product(t, 96, 192), Product(r, 96, 192))


def test_codes_are_multiplied_at_a_rate_of_their_own() -> None:
    rates = Rates(1e12, 1e12, "known", {"fp8": 2e12})
    bf16, fp8 = (Floor(rates, (Product({"T": 1}, 10**6, 10**6, codes=codes),), (), 0) for codes in ("", "fp8"))
    assert bf16.prefill(100) == pytest.approx(2e8 / 1e12)
    assert fp8.prefill(100) == pytest.approx(1e8 / 1e12)


@pytest.mark.parametrize("kind", ["int8"])
def test_rates_of_codes_are_measured(kind: str) -> None:
    assert measure(torch.device("cpu"), torch.float32, {kind}).codes[kind] > 1e9
