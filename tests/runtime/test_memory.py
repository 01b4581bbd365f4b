"""Memory is planned: what does not fit is an error with numbers, before any weight is read."""

from types import SimpleNamespace

import pytest

from ingot.artifacts.manifest import Group, WeightTensor
from ingot.runtime import memory
from ingot.runtime.memory import MemoryPlanError, plan_memory

PAGE = 1 << 20  # bytes of 16 tokens
WEIGHTS = 100 << 20


FULL, SLOT = Group("full", "page", 16, PAGE), Group("slot", "slot", 0, 1 << 16)


def artifact(groups: tuple[Group, ...] = (FULL, SLOT), positions: int = 4096, max_num_seqs: int = 8, max_num_batched_tokens: int = 512):
    weight = WeightTensor("w", "bfloat16", (WEIGHTS // 2,), 0, WEIGHTS, ["tensor", ["w"], []])
    options = SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    model = SimpleNamespace(max_model_len=positions, name="m")
    target = SimpleNamespace(kind="cuda")
    return SimpleNamespace(manifest=SimpleNamespace(target=target, weights=(weight,), options=options, groups=groups, model=model))


def plan(monkeypatch: pytest.MonkeyPatch, free: int, max_model_len: int | None = None, num_pages: int | None = None, **given: object):
    monkeypatch.setattr(memory, "_free", lambda kind, utilization, weight_bytes: (free, "the card"))
    return plan_memory(artifact(**given), 1 << 20, max_model_len=max_model_len, utilization=0.9, num_pages=num_pages)


def test_room_becomes_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(monkeypatch, WEIGHTS + (1 << 20) + 8 * (1 << 16) + 700 * PAGE)
    assert made.num_units == {"full": 700, "slot": 8}
    assert made.max_model_len == 4096
    assert made.cache_bytes == 700 * PAGE + 8 * (1 << 16)


def test_no_more_than_all_sequences_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch, 1 << 40).num_units["full"] == 8 * 4096 // 16


def test_a_short_cache_shortens_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch, WEIGHTS + (2 << 20) + 100 * PAGE).max_model_len == 100 * 16


def test_a_length_that_was_asked_for_is_not_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryPlanError, match=r"--max-model-len 4000 .* 0\.16 GB more than the card has left; use --max-model-len 1600"):
        plan(monkeypatch, WEIGHTS + (1 << 20) + 8 * (1 << 16) + 100 * PAGE, max_model_len=4000)


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryPlanError, match=r"weights 0\.10 GB.*the card has 0\.05 GB.*0\.07 GB are missing"):
        plan(monkeypatch, 50_000_000)


def test_longer_than_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryPlanError, match="8192 is more than the 4096 positions"):
        plan(monkeypatch, 1 << 40, max_model_len=8192)


# A layer in six sees everything, the others 1,024 tokens (Gemma 3): pages of 16 tokens and, together, one PAGE.
HYBRID = (Group("full", "page", 16, PAGE // 6), Group("window1024", "page", 16, PAGE * 5 // 6, 1024))
WINDOW = -(-1023 // 16) + 1  # pages of a window that begins anywhere
ALONE = -(-(1024 + 512 - 2) // 16) + 1  # and of a window and a step


def hybrid(monkeypatch: pytest.MonkeyPatch, pages: int, **given: object):
    """With room for so many PAGEs."""
    return plan(monkeypatch, WEIGHTS + (1 << 20) + pages * PAGE, groups=HYBRID, positions=131072, **given)


def test_windows_leave_their_room_to_what_sees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    made = hybrid(monkeypatch, 3000)
    assert made.num_units["window1024"] == 8 * WINDOW + 512 // 16  # all sequences and a step: never more
    assert made.num_units["full"] == (3000 * PAGE - made.num_units["window1024"] * (PAGE * 5 // 6)) // (PAGE // 6) > 4 * 3000
    assert made.max_model_len == 131072
    assert made.cache_bytes <= 3000 * PAGE


def test_the_longest_sequence_comes_before_the_windows_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    made = hybrid(monkeypatch, 1500, max_num_seqs=64)  # 64 windows would leave 1,500 · 16 tokens
    assert made.max_model_len == 131072
    assert made.num_units["full"] == 131072 // 16
    assert ALONE < made.num_units["window1024"] < 4 * ALONE
    assert 0.99 * 1500 * PAGE < made.cache_bytes <= 1500 * PAGE


def test_a_window_needs_the_same_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    short = hybrid(monkeypatch, 500)
    assert short.num_units["window1024"] == ALONE
    assert short.max_model_len == short.num_units["full"] * 16 == (500 * PAGE - ALONE * (PAGE * 5 // 6)) // (PAGE // 6) * 16 > 2 * 500 * 16
    only = plan(monkeypatch, WEIGHTS + (1 << 20) + 150 * PAGE, groups=(Group("window1024", "page", 16, PAGE, 1024),), positions=131072)
    assert (only.max_model_len, only.num_units) == (131072, {"window1024": 150})
    with pytest.raises(MemoryPlanError, match="does not fit"):
        plan(monkeypatch, WEIGHTS + (1 << 20) + 10 * PAGE, groups=HYBRID, positions=131072)
