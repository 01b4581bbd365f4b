"""Memory is planned: what does not fit is an error with numbers, before any weight is read."""

from types import SimpleNamespace

import pytest

from ingot.artifacts.manifest import Group, WeightTensor
from ingot.runtime import memory
from ingot.runtime.memory import MemoryPlanError, plan_memory

PAGE = 1 << 20  # bytes of 16 tokens
WEIGHTS = 100 << 20


def artifact(max_model_len: int = 4096, max_num_seqs: int = 8):
    weight = WeightTensor("w", "bfloat16", (WEIGHTS // 2,), 0, WEIGHTS, ["tensor", ["w"], []])
    return SimpleNamespace(manifest=SimpleNamespace(
        target=SimpleNamespace(kind="cuda"), weights=(weight,), options=SimpleNamespace(max_num_seqs=max_num_seqs),
        groups=(Group("full", "page", 16, PAGE // 2), Group("window8", "page", 16, PAGE // 2, 8), Group("slot", "slot", 0, 1 << 16)),
        model=SimpleNamespace(max_model_len=max_model_len, name="m"),
    ))  # fmt: skip


def plan(monkeypatch: pytest.MonkeyPatch, free: int, max_model_len: int | None = None, num_pages: int | None = None):
    monkeypatch.setattr(memory, "_free", lambda kind, utilization, weight_bytes: (free, "the card"))
    return plan_memory(artifact(), 1 << 20, max_model_len=max_model_len, utilization=0.9, num_pages=num_pages)


def test_room_becomes_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(monkeypatch, WEIGHTS + (1 << 20) + 8 * (1 << 16) + 700 * PAGE)
    assert made.num_units == {"full": 700, "window8": 700, "slot": 8}
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
