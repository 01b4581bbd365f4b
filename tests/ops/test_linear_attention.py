"""The recurrences against transformers' own loops, and a sequence cut into steps against the sequence whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from ingot.ops import OPS

TOKENS = 11


def step(begin: int, end: int) -> list[torch.Tensor]:
    """Tokens begin…end of a sequence in slot 2, behind a padding row."""
    return [torch.tensor(v, dtype=torch.int32) for v in ([0, 0, end - begin], [0, end], [-1, 2])]


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) for s in shapes]


def delta(channels: bool) -> tuple[list[torch.Tensor], tuple[int, ...], tuple[object, ...]]:
    q, k, v, g, beta = draw(0, (TOKENS, 3, 5), (TOKENS, 3, 5), (TOKENS, 6, 7), (TOKENS, 6, 5) if channels else (TOKENS, 6), (TOKENS, 6))
    return [q, k, v, -g.abs(), beta.sigmoid()], (6, 5, 7), (1e-6,)


CASES = {
    "gated_delta_rule": delta(False),
    "gated_delta_rule by channel": delta(True),
    "linear_recurrence": ([x if i == 0 else x.sigmoid() for i, x in enumerate(draw(1, (TOKENS, 9), (TOKENS, 9)))], (9,), ()),
}
WKV = draw(2, (TOKENS, 9), (TOKENS, 9), (9,), (9,))


def run(name: str, tokens: list[torch.Tensor], fixed: list[torch.Tensor], shape: tuple[int, ...], rest: tuple[object, ...], cuts: list[int]) -> torch.Tensor:
    """`tokens` through the reference in steps that end at `cuts`; the state starts as noise, and other slots stay as they are."""
    state = torch.full((4, *shape), float("nan"))
    out = []
    for begin, end in zip([0, *cuts[:-1]], cuts, strict=True):
        out.append(OPS[name].reference(*(x[begin:end] for x in tokens), *fixed, state, *step(begin, end), *rest))
    assert state[[0, 1, 3]].isnan().all()
    return torch.cat(out)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cuts", [[4, 5, TOKENS], [1, 2, 3, TOKENS]])
def test_steps_equal_the_whole(case: str, cuts: list[int]) -> None:
    tokens, shape, rest = CASES[case]
    name = case.split()[0]
    whole = run(name, tokens, [], shape, rest, [TOKENS])
    assert whole.isfinite().all()
    torch.testing.assert_close(run(name, tokens, [], shape, rest, cuts), whole)


def test_wkv_steps_equal_transformers() -> None:
    k, v, decay, bonus = WKV
    expected = rwkv_linear_attention_cpu(decay, bonus, k[None], v[None])[0][0]
    for cuts in ([TOKENS], [3, 4, TOKENS]):
        torch.testing.assert_close(run("wkv", [k, v], [-decay.exp(), bonus], (3, 9), (), cuts), expected)


@pytest.mark.parametrize("normalized", [True, False])
def test_gated_delta_rule_equals_transformers(normalized: bool) -> None:
    (q, k, v, g, beta), shape, _ = delta(False)
    expected = torch_recurrent_gated_delta_rule(*(x[None] for x in (q, k, v)), g=g[None], beta=beta[None], use_qk_l2norm_in_kernel=normalized)[0][0]
    torch.testing.assert_close(run("gated_delta_rule", [q, k, v, g, beta], [], shape, (1e-6 if normalized else 0.0,), [TOKENS]), expected)


def test_linear_recurrence_by_hand() -> None:
    x, a = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.5], [0.5], [0.1]])
    torch.testing.assert_close(run("linear_recurrence", [x, a], [], (1,), (), [1, 3]), torch.tensor([[1.0], [2.5], [3.25]]))


@pytest.mark.parametrize("make", [lambda s: s, lambda s: s.bfloat16()], ids=["float32", "bfloat16"])
def test_results_have_the_dtype_of_their_input(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    (q, k, v, g, beta), shape, rest = delta(False)
    y = OPS["gated_delta_rule"].reference(make(q), make(k), make(v), g, beta, torch.zeros(4, *shape), *step(0, TOKENS), *rest)
    assert y.dtype == make(v).dtype
