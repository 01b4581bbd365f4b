"""The KV cache's bookkeeping, against a model of what its pages hold."""

from array import array

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ingot.runtime.kv_cache import GroupInfo, KVCache
from ingot.runtime.records import sampling_record
from ingot.runtime.request import Request, SamplingParams, Sequence

PAGES = {"full": GroupInfo("page", 4, 14), "window7": GroupInfo("page", 2, 22, window=7), "window3": GroupInfo("page", 2, 11, window=3)}
MAX_LEN, MAX_SEQS, MAX_NEW = 40, 5, 9


def sequence(tokens: list[int], keys: tuple[str, ...] = (), **params: object) -> Sequence:
    request = Request("r", list(tokens), SamplingParams(**params), cache_keys=keys)
    return Sequence(request, 0, (0,), 16, array("i", tokens), sampling_record(request.params, 0))


def computed(cache: KVCache, seq: Sequence) -> int:
    return int(cache.rows.num_computed[seq.row])


def launch(cache: KVCache, seq: Sequence, count: int) -> None:
    """A step computes `count` more tokens of `seq`."""
    cache.rows.num_computed[seq.row] += count
    rows = np.array([seq.row])
    cache.launched([seq], rows, cache.rows.num_computed[rows], np.array([len(seq.token_ids)]))


class CacheMachine(RuleBasedStateMachine):
    """Admit, grow, compute, extend and release sequences of few distinct tokens, so that prefixes meet.

    `written[group][page]` is what the model would have written to a page: (keys, all tokens up to each position).
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(PAGES, MAX_SEQS, MAX_LEN, max_num_new=MAX_NEW)
        self.running: list[Sequence] = []
        self.written: dict[str, dict[int, list[object]]] = {name: {} for name in PAGES}

    @rule(stem=st.integers(0, 2), length=st.integers(1, 30), tail=st.lists(st.integers(0, 1), max_size=4), keys=st.sampled_from([(), ("salt",)]),
          spare=st.integers(0, 3), scores=st.booleans(), steps=st.booleans())  # fmt: skip
    def admit(self, stem: int, length: int, tail: list[int], keys: tuple[str, ...], spare: int, scores: bool, steps: bool) -> None:
        seq = sequence([(stem * i) % 3 for i in range(length)] + tail, keys, prompt_logprobs=0 if scores else None)
        before = {n: p.num_available for n, p in self.cache.pools.items()}
        if not self.cache.admit(seq, spare):
            assert seq.row == -1
            assert before == {n: p.num_available for n, p in self.cache.pools.items()}
            return
        self.running.append(seq)
        assert 0 <= computed(self.cache, seq) < len(seq.token_ids)
        assert computed(self.cache, seq) == 0 or not scores or len(seq.token_ids) == 1
        if not steps:
            return
        while computed(self.cache, seq) < len(seq.token_ids):  # what admission promised
            assert self._compute(seq, MAX_NEW)
            for name, pool in self.cache.pools.items():
                assert pool.num_available >= spare, name

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, MAX_SEQS), count=st.integers(1, MAX_NEW))
    def compute(self, which: int, count: int) -> None:
        self._compute(self.running[which % len(self.running)], count)

    def _compute(self, seq: Sequence, count: int) -> bool:
        begin = computed(self.cache, seq)
        count = min(count, len(seq.token_ids) - begin)
        if not self.cache.grow(seq, begin + count):
            return False
        self.every_token_that_is_still_seen_is_in_its_page()
        for name, group in PAGES.items():
            for t in range(begin, begin + count):
                page = int(self.cache.page_tables[name][seq.row, t // group.page_size])
                entries = self.written[name].setdefault(page, [None] * group.page_size)
                entries[t % group.page_size] = (seq.request.cache_keys, tuple(seq.token_ids[: t + 1]))
        launch(self.cache, seq, count)
        return True

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, MAX_SEQS), token=st.integers(0, 1))
    def extend(self, which: int, token: int) -> None:
        seq = self.running[which % len(self.running)]
        if len(seq.token_ids) < MAX_LEN:
            seq.append(len(seq.token_ids), token)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, MAX_SEQS), token=st.integers(0, 1))
    def fork(self, which: int, token: int) -> None:
        seq = self.running[which % len(self.running)]
        if computed(self.cache, seq) == MAX_LEN:
            return
        child = sequence([*seq.token_ids[: computed(self.cache, seq)], token], seq.request.cache_keys)
        available = {n: p.num_available for n, p in self.cache.pools.items()}
        if not self.cache.fork(seq, child):
            assert child.row == -1 and not self.cache.copies
            assert available == {n: p.num_available for n, p in self.cache.pools.items()}
            return
        assert all(n - p.num_available <= 1 for n, p in zip(available.values(), self.cache.pools.values(), strict=True))
        for number, source, target in self.cache.copies:
            written = self.written[list(PAGES)[number]]
            written[target] = list(written[source])
        self.cache.copies = []
        self.running.append(child)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, MAX_SEQS))
    def release(self, which: int) -> None:
        self.cache.release(self.running.pop(which % len(self.running)))

    @invariant()
    def holds(self) -> None:
        self.cache.check_integrity()

    @invariant()
    def every_token_that_is_still_seen_is_in_its_page(self) -> None:
        for seq in self.running:
            for name, group in PAGES.items():
                for t in range(max(0, computed(self.cache, seq) - group.window + 1) if group.window else 0, computed(self.cache, seq)):
                    page = int(self.cache.page_tables[name][seq.row, t // group.page_size])
                    expected = (seq.request.cache_keys, tuple(seq.token_ids[: t + 1]))
                    assert self.written[name][page][t % group.page_size] == expected

    @invariant()
    def a_window_holds_no_more_than_it_needs(self) -> None:
        for seq in self.running:
            for name, group in PAGES.items():
                held = self.cache.num_pages[name][seq.row] - self.cache.first_page[name][seq.row]
                assert held <= group.most_pages(MAX_LEN, MAX_NEW)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.nightly
class TestManyCacheMachines(CacheMachine.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=40, deadline=None, derandomize=False)


def fill(cache: KVCache, tokens: list[int], **request: object) -> Sequence:
    seq = sequence(tokens, **request)
    assert cache.admit(seq)
    advance(cache, seq)
    return seq


def advance(cache: KVCache, seq: Sequence, step: int = 64) -> None:
    """Compute what is left, `step` tokens at a time."""
    while left := min(step, len(seq.token_ids) - computed(cache, seq)):
        assert cache.grow(seq, computed(cache, seq) + left)
        launch(cache, seq, left)


def test_the_last_token_is_never_taken_from_the_cache():
    cache = KVCache({"full": GroupInfo("page", 4, 16)}, 4, 64)
    tokens = list(range(16))
    fill(cache, tokens)
    for length, found in [(17, 16), (16, 12), (13, 12), (12, 8), (4, 0), (5, 4), (1, 0)]:
        assert cache.match(sequence([*tokens, 3][:length])) == found
    assert cache.match(sequence([9, *tokens])) == 0
    assert cache.match(sequence(tokens, ("adapter",))) == 0
    assert cache.match(sequence(tokens, prompt_logprobs=0)) == 0


def test_a_prefix_ends_where_pages_of_all_groups_end():
    cache = KVCache({"a": GroupInfo("page", 4, 16), "b": GroupInfo("page", 6, 16)}, 4, 64)
    fill(cache, list(range(23)))
    assert cache.match(sequence(list(range(30)))) == 12  # a holds 20 tokens, b 18


def test_every_full_page_can_be_found_whenever_it_became_full():
    cache = KVCache({"a": GroupInfo("page", 4, 16), "b": GroupInfo("page", 6, 16)}, 4, 64)
    seq = sequence(list(range(30)))
    assert cache.admit(seq)
    assert cache.grow(seq, 30)
    for _ in range(30):
        launch(cache, seq, 1)
    assert {name: len(pool.page_of) for name, pool in cache.pools.items()} == {"a": 7, "b": 5}


def test_a_page_gets_its_name_when_its_last_token_is_known():
    cache = KVCache({"full": GroupInfo("page", 4, 16)}, 4, 64)
    seq = sequence(list(range(7)))
    assert cache.admit(seq)
    assert cache.grow(seq, 8)
    launch(cache, seq, 7)
    launch(cache, seq, 1)  # the eighth, which is still on the device
    assert len(cache.pools["full"].page_of) == 1
    seq.append(len(seq.token_ids), 7)
    cache.check_integrity()
    cache.release(seq)
    assert cache.match(sequence(list(range(9)))) == 8


def test_prefixes_can_be_forgotten():
    cache = KVCache({"full": GroupInfo("page", 4, 16)}, 4, 64)
    tokens = list(range(12))
    cache.release(fill(cache, tokens))
    running = fill(cache, tokens)
    cache.forget_prefixes()
    assert cache.match(sequence(tokens)) == 0
    cache.check_integrity()
    cache.release(running)
    assert cache.pools["full"].num_used == 0


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning():
    cache = KVCache({"full": GroupInfo("page", 4, 6)}, 4, 64)
    old, new = [1] * 8, [2] * 8
    for tokens in (old, new):
        cache.release(fill(cache, tokens))
    assert cache.pools["full"].num_used == 0
    fill(cache, [3] * 12)  # two free pages, and the end of the oldest prefix
    assert cache.match(sequence([*old, 0])) == 4
    assert cache.match(sequence([*new, 0])) == 8
    cache.check_integrity()


def test_sequences_share_pages_of_equal_prefixes_only():
    cache = KVCache({"full": GroupInfo("page", 4, 16)}, 4, 64)
    first, second = fill(cache, [*range(8), 1, 1, 1, 1, 1]), fill(cache, [*range(8), 2, 2, 2, 2, 2])
    table = cache.page_tables["full"]
    assert second.num_cached == 8
    assert table[first.row, :2].tolist() == table[second.row, :2].tolist()
    assert not set(table[first.row, 2:4].tolist()) & set(table[second.row, 2:4].tolist())
    cache.release(first)
    assert cache.pools["full"].num_used == 4
    cache.check_integrity()


def test_slots_are_one_for_each_sequence_and_put_prefix_caching_off():
    cache = KVCache({"full": GroupInfo("page", 4, 64), "slot": GroupInfo("slot", 0, 3)}, 8, 64)
    rows = {fill(cache, [1, 2, 3, 4, 5, 6]).row for _ in range(3)}
    assert rows == {0, 1, 2}
    assert not cache.admit(sequence([1]))
    assert "slot" in cache.prefix_caching_off
    assert cache.prefix_hits == 0


def test_prefix_caching_can_be_disabled():
    cache = KVCache(PAGES, MAX_SEQS, MAX_LEN, enable_prefix_caching=False)
    tokens = np.random.default_rng(0).integers(0, 9, 13).tolist()
    fill(cache, tokens)
    assert fill(cache, tokens).num_cached == 0
    assert cache.prefix_caching_off == "disabled by the caller"


def test_integrity_sees_a_lost_and_a_wrongly_shared_page():
    cache = KVCache(PAGES, MAX_SEQS, MAX_LEN)
    a, b = fill(cache, [1, 2, 3, 4, 5]), fill(cache, [5, 4, 3, 2, 1])
    table = cache.page_tables["full"]
    kept = table.copy()
    table[a.row, 1] = table[b.row, 1]
    with pytest.raises(AssertionError, match="full: references"):
        cache.check_integrity()
    table[:] = kept
    cache.pools["full"].free.pop()
    with pytest.raises(AssertionError, match="full: a page is lost"):
        cache.check_integrity()


def test_pages_behind_the_window_are_let_go():
    cache = KVCache({"full": GroupInfo("page", 4, 32), "window6": GroupInfo("page", 4, 5, window=6)}, 2, 128, max_num_new=8)
    seq = fill_by(cache, list(range(100)), 8)
    assert (cache.first_page["window6"][seq.row], cache.num_pages["window6"][seq.row]) == (23, 25)  # 95 … 99 are seen by token 100
    assert cache.pools["window6"].num_used == 2
    assert cache.pools["full"].num_used == 25
    row = cache.page_tables["window6"][seq.row]
    assert set(row[:24].tolist()) == {row[23]}
    cache.check_integrity()


def fill_by(cache: KVCache, tokens: list[int], step: int) -> Sequence:
    seq = sequence(tokens)
    assert cache.admit(seq)
    advance(cache, seq, step)
    return seq


def test_a_sequence_longer_than_a_windows_pool_runs_alone():
    groups = {"window6": GroupInfo("page", 4, 5, window=6)}
    assert KVCache(groups, 2, 1000, max_num_new=8).capacity > 1000  # 6 + 8 − 2 tokens after the first touch 4 pages
    assert KVCache(groups, 2, 1000, max_num_new=16).capacity == 20  # a step alone takes 4, and its window 2 more
    cache = KVCache(groups, 1, 1000, max_num_new=8)
    assert computed(cache, fill_by(cache, list(range(900)), 8)) == 900


def test_a_prefix_needs_the_window_before_its_end_and_no_more():
    cache = KVCache({"full": GroupInfo("page", 4, 64), "window6": GroupInfo("page", 4, 12, window=6)}, 2, 128, max_num_new=8)
    tokens = list(range(40))
    cache.release(fill_by(cache, tokens, 8))
    assert cache.match(sequence([*tokens, 1])) == 40
    assert cache.match(sequence([*tokens[:30], 1])) == 28
    other = fill_by(cache, [5] * 33, 8)  # takes the windows' pages, from the earliest on
    assert cache.match(sequence([*tokens[:9], 1])) == 0
    assert cache.match(sequence([*tokens[:30], 1])) == 0
    assert cache.match(sequence([*tokens, 1])) == 40  # 35 … 39 are still there
    seq = sequence([*tokens, *range(7)])
    assert cache.admit(seq)
    assert (seq.num_cached, cache.first_page["window6"][seq.row], cache.num_pages["window6"][seq.row]) == (40, 8, 10)
    cache.check_integrity()
    cache.release(other)


def test_a_fork_shares_full_pages_and_copies_the_last():
    cache = KVCache({"full": GroupInfo("page", 4, 16), "slot": GroupInfo("slot", 0, 4)}, 4, 64)
    seq = fill(cache, list(range(10)))
    child = sequence([*range(10), 5])
    assert cache.fork(seq, child)
    table = cache.page_tables["full"]
    assert table[child.row, :2].tolist() == table[seq.row, :2].tolist()
    assert cache.copies == [(0, table[seq.row, 2], table[child.row, 2]), (1, seq.row, child.row)]
    cache.check_integrity()
    cache.release(child)
    assert cache.copies == []  # nobody's to fill
    whole = fill(cache, list(range(8)))
    again = sequence([*range(8), 1])
    assert cache.fork(whole, again)
    assert cache.copies == [(1, whole.row, again.row)]  # no page is partly full
    cache.release(whole)
    cache.release(again)
    cache.release(seq)
    assert cache.pools["full"].num_used == 0
    cache.check_integrity()
