"""Memory is planned: what does not fit is an error with numbers, before any weight is read."""

from types import SimpleNamespace

import pytest
import torch

from ingot.artifacts.manifest import Group, State, WeightTensor
from ingot.artifacts.plan import Arg, Entry, Value, Variant
from ingot.runtime import memory
from ingot.runtime.logits import LogitsProcessor, processor_bytes
from ingot.runtime.memory import MemoryPlanError, plan_memory
from ingot.runtime.sampler import workspace_bytes

PAGE = 1 << 20  # bytes of 16 tokens
WEIGHTS = 100 << 20
VOCAB = 1000
FORWARD = Variant("forward", "tokens", 512, 8, 512, 40, (), (), (), (), 3 << 18)
SAMPLE = Variant("sample", "sample", 512, 512, 1, 512, (), (), (), (), 1 << 18)


FULL, SLOT = Group("full", "page", 16, PAGE), Group("slot", "slot", 0, 1 << 16)


def artifact(groups: tuple[Group, ...] = (FULL, SLOT), positions: int = 4096, max_num_seqs: int = 8, max_num_batched_tokens: int = 512):
    weight = WeightTensor("w", "bfloat16", (WEIGHTS // 2,), 0, WEIGHTS, ["tensor", ["w"], []])
    options = SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    model = SimpleNamespace(max_model_len=positions, name="m", vocab_size=VOCAB)
    target = SimpleNamespace(kind="cuda")
    return SimpleNamespace(manifest=SimpleNamespace(target=target, weights=(weight,), options=options, groups=groups, model=model, states=()))


def plan(monkeypatch: pytest.MonkeyPatch, free: int, max_model_len: int | None = None, num_pages: int | None = None, **given: object):
    """With `free` bytes beside what sampling needs."""
    made = artifact(**given)
    work = processor_bytes(made.manifest.options.max_num_seqs, max(made.manifest.options.max_num_seqs, 40), VOCAB) + workspace_bytes(VOCAB)
    monkeypatch.setattr(memory, "_free", lambda *_: (free + work, "the card"))
    return plan_memory(made, (FORWARD, SAMPLE), max_model_len=max_model_len, utilization=0.9, num_pages=num_pages)


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
    with pytest.raises(
        MemoryPlanError,
        match=r"weights 0\.10 GB.*the card has 0\.32 GB.*0\.07 GB are missing; .*-tokens \(now 512\) or --max-num-seqs \(now 8\)",
    ):
        plan(monkeypatch, 50_000_000)


def test_pages_that_were_asked_for_and_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    free = WEIGHTS + (1 << 20) + 8 * (1 << 16) + 100 * PAGE
    assert plan(monkeypatch, free, num_pages=100).num_units["full"] == 100
    with pytest.raises(MemoryPlanError, match=r"num_pages 1000000000 takes .* GB of KV cache, and the card has 0\.10 GB left; use 100 or less"):
        plan(monkeypatch, free, num_pages=10**9)


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


def test_what_rules_need_is_there_before_a_request_has_any() -> None:
    processor = LogitsProcessor(5, 7, VOCAB, torch.device("cpu"))
    assert sum(t.nbytes for t in vars(processor).values() if isinstance(t, torch.Tensor)) == processor_bytes(5, 7, VOCAB)


def test_the_largest_temporary_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling, a copy of a slot for every sequence, or the reference of an entry."""
    made = artifact()
    monkeypatch.setattr(memory, "_free", lambda *_: (1 << 40, "the card"))

    def workspace(forward: Variant, states: tuple[State, ...] = ()) -> int:
        made.manifest.states = states
        return plan_memory(made, (forward, SAMPLE), max_model_len=None, utilization=0.9, num_pages=None).workspace_bytes - processor_bytes(8, 40, VOCAB)

    assert workspace(FORWARD) == workspace_bytes(VOCAB)
    assert workspace(FORWARD, (State("state_0", "slot", "float32", (64, 1 << 20)),)) == 8 * (64 << 20) * 4
    values = (
        Value("x", "bfloat16", ({"T": 1}, 1 << 14), "arena"),
        Value("y", "bfloat16", ({"T": 2}, 1 << 14), "arena"),
        Value("w", "bfloat16", (9,), "weight"),
    )
    entry = Entry("y", "ingot.moe", "torch", (Arg(value="x"), Arg(value="w")), ("y",))
    variant = Variant("forward", "tokens", 512, 8, 512, 40, (), values, (entry,), ("y",), 0)
    assert workspace(variant) == 3 * 4 * 3 * 512 * (1 << 14)
