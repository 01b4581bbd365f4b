"""The scheduler as a state machine, and its promises one by one."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ingot.runtime.kv_cache import GroupInfo, KVCache
from ingot.runtime.request import Request, RequestError, SamplingParams, Sequence, Status, TokenLogprob
from ingot.runtime.scheduler import Scheduler, _Step

TOKENS, ROWS, SEQS = 24, 6, 5


def make(scheduler: Scheduler, number: int, prompt: list[int], max_tokens: int = 8, priority: int = 0, scores: bool = False) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if scores else None)
    seq = Sequence(Request(f"r{number}", prompt, params, priority), 0, (priority, number), max_tokens, list(prompt))
    scheduler.add(seq)
    return seq


def compute(scheduler: Scheduler, token: int = 1) -> list[tuple[Sequence, int]]:
    """One step: what was scheduled. Sequences that are complete finish."""
    scheduled = scheduler.schedule()
    for seq, num_new in scheduled:
        for position in seq.prompt_rows(num_new):
            seq.add_prompt_logprob(TokenLogprob(seq.token_ids[position + 1], -1.0))
    sampling = [seq for seq, n in scheduled if seq.samples(n)]
    scheduler.update(scheduled)
    for seq in sampling:
        seq.token_ids.append(token)
        if seq.num_output >= seq.max_tokens:
            scheduler.finish(seq)
    return scheduled


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, are aborted, and steps run, over pools so small that sequences are preempted and prefixes evicted."""

    def __init__(self) -> None:
        super().__init__()
        groups = {"full": GroupInfo("page", 4, 14), "window7": GroupInfo("page", 2, 17, window=7)}
        self.scheduler = Scheduler(KVCache(groups, SEQS, 64, max_num_new=TOKENS), max_num_seqs=SEQS, max_num_batched_tokens=TOKENS, max_num_rows=ROWS)
        self.alive: list[Sequence] = []
        self.number = 0

    @rule(stem=st.integers(0, 2), length=st.integers(1, 36), last=st.integers(0, 3), max_tokens=st.integers(1, 16), priority=st.integers(0, 1),
          scores=st.booleans())  # fmt: skip
    def arrive(self, stem: int, length: int, last: int, max_tokens: int, priority: int, scores: bool) -> None:
        self.number += 1
        prompt = [(stem * i) % 3 for i in range(length)] + [last]
        self.alive.append(make(self.scheduler, self.number, prompt, max_tokens, priority, scores))

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 50))
    def abort(self, which: int) -> None:
        self.scheduler.finish(self.alive.pop(which % len(self.alive)))

    @rule(token=st.integers(0, 2))
    def step(self, token: int) -> None:
        running = {s for s in self.alive if s.status is Status.RUNNING}
        preemptions = self.scheduler.num_preemptions
        first = min(self.alive, key=lambda s: s.order, default=None)
        before = {s: (s.num_computed, len(s.token_ids)) for s in running}
        rows = 0

        scheduled = self.scheduler.schedule()
        for seq, n in scheduled:
            rows += len(seq.prompt_rows(n)) + seq.samples(n)
            assert 1 <= n <= seq.num_uncomputed
            assert seq.status is Status.RUNNING
            if seq in before:
                assert (seq.num_computed, len(seq.token_ids)) == before[seq]
        assert sum(n for _, n in scheduled) <= TOKENS
        assert rows <= ROWS
        assert len({s for s, _ in scheduled}) == len(scheduled)
        preempted = {s for s in running if s.status is Status.WAITING}
        assert len(preempted) == self.scheduler.num_preemptions - preemptions
        kept = [s for s, _ in scheduled if s in running]
        if preempted:
            assert {s for s, _ in scheduled} <= running  # nobody new while others give way
            assert max(s.order for s in self.scheduler.running) < min(s.order for s in preempted)
        # Decoding goes before prefilling, and that before admission.
        uncomputed = [s.num_uncomputed == 1 for s in kept]
        assert uncomputed == sorted(uncomputed, reverse=True)
        assert [s for s, _ in scheduled][: len(kept)] == kept
        if first is not None and first in running:
            assert first.status is Status.RUNNING  # so that somebody always gets on
        assert bool(scheduled) == bool(self.alive)

        for seq, n in scheduled:
            for position in seq.prompt_rows(n):
                assert position == len(seq.prompt_logprobs) - 1
                seq.add_prompt_logprob(TokenLogprob(0, -1.0))
        sampling = [s for s, n in scheduled if s.samples(n)]
        self.scheduler.update(scheduled)
        for seq in sampling:
            assert not seq.wants_prompt_logprobs
            seq.token_ids.append(token)
            if seq.num_output >= seq.max_tokens:
                self.alive.remove(seq)
                self.scheduler.finish(seq)

    @invariant()
    def holds(self) -> None:
        self.scheduler.check_integrity()
        assert {*self.scheduler.running, *self.scheduler.waiting} == set(self.alive)

    def teardown(self) -> None:
        """Everybody ends, and nothing is held then."""
        for _ in range(2000):
            if not self.alive:
                break
            self.step(1)
        self.holds()
        assert not self.alive
        assert all(p.num_used == 0 for p in self.scheduler.cache.pools.values())


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def scheduler(pages: int = 64, seqs: int = 8, tokens: int = 32, rows: int = 0, caching: bool = True) -> Scheduler:
    return Scheduler(KVCache({"full": GroupInfo("page", 4, pages)}, seqs, 256, caching), max_num_seqs=seqs, max_num_batched_tokens=tokens, max_num_rows=rows)


def sizes(scheduled: list[tuple[Sequence, int]]) -> list[tuple[str, int]]:
    return [(seq.request.id, n) for seq, n in scheduled]


def test_prompts_are_cut_to_the_budget_and_decoding_goes_first():
    s = scheduler()
    make(s, 0, [0] * 10)
    make(s, 1, [1] * 40)
    make(s, 2, [2] * 5)
    assert sizes(compute(s)) == [("r0", 10), ("r1", 22)]
    assert sizes(compute(s)) == [("r0", 1), ("r1", 18), ("r2", 5)]
    assert sizes(compute(s)) == [("r0", 1), ("r1", 1), ("r2", 1)]


def test_the_latest_arrival_is_preempted_and_computed_again_with_what_it_said():
    s = scheduler(pages=7, caching=False)
    a, b = make(s, 0, [1] * 10), make(s, 1, [2] * 9)
    assert sizes(compute(s)) == [("r0", 10), ("r1", 9)]
    while s.num_preemptions == 0:
        compute(s, token=5)
    assert (a.status, b.status) == (Status.RUNNING, Status.WAITING)
    assert (b.num_computed, b.row) == (0, -1)
    said = b.num_output
    assert said > 0
    while a.status is Status.RUNNING:
        compute(s)
    assert sizes(compute(s)) == [("r1", 9 + said)]


def test_one_that_was_scheduled_already_can_still_be_preempted():
    """A decoding sequence comes first in a step; then the prompt of one with priority needs its pages."""
    s = scheduler(pages=12, tokens=3, caching=False)
    late = make(s, 0, [1] * 16, max_tokens=32)
    while late.num_output == 0:
        compute(s)
    make(s, 1, [2] * 24, priority=-1)
    assert sizes(compute(s)) == [("r0", 1), ("r1", 2)]
    while s.num_preemptions == 0:
        scheduled = compute(s)
    assert sizes(scheduled) == [("r1", 2)]
    assert late.status is Status.WAITING
    s.check_integrity()


def test_what_a_sequence_gives_back_can_be_given_to_another():
    step = _Step(20, 9)
    request = Request("r", [0] * 12, SamplingParams(prompt_logprobs=0))
    seq = Sequence(request, 0, (0,), 8, [0] * 12)
    step.add(seq, 9)
    assert (step.tokens, step.rows, step.items) == (11, 0, {seq: 9})
    step.discard(seq)
    step.discard(seq)
    assert (step.tokens, step.rows, step.items) == (20, 9, {})


def test_a_preempted_sequence_finds_its_own_pages_again():
    s = scheduler(pages=9)
    a, b = make(s, 0, [1] * 18, max_tokens=16), make(s, 1, [2] * 9, max_tokens=16)
    while s.num_preemptions == 0:
        compute(s)
    length = len(b.token_ids)
    s.finish(a)
    compute(s)
    assert s.num_preemptions == 1
    assert s.cache.page_tables["full"].shape == (8, 64)
    assert b.num_computed == length
    assert b.num_cached == 0  # of the prompt, when it first came


def test_equal_prompts_share_pages_once_the_first_is_computed():
    s = scheduler(tokens=64)
    prompt = np.random.default_rng(0).integers(0, 50, 21).tolist()
    make(s, 0, prompt)
    compute(s)
    make(s, 1, prompt)
    assert sizes(compute(s)) == [("r0", 1), ("r1", 1)]
    assert s.cache.pools["full"].num_used == 7


def test_a_newcomer_waits_until_the_running_have_a_page_to_spare():
    s = scheduler(pages=7)
    for i in range(3):
        make(s, i, [i] * 8)  # with two spare pages the third does not fit
    assert sizes(compute(s)) == [("r0", 8), ("r1", 8)]
    assert [q.request.id for q in s.waiting] == ["r2"]


def test_rows_of_logits_are_limited():
    s = scheduler(rows=5)
    make(s, 0, [0] * 9, scores=True)
    make(s, 1, [1] * 4)
    make(s, 2, [2] * 4)
    assert sizes(compute(s)) == [("r0", 5)]
    assert sizes(compute(s)) == [("r0", 4), ("r1", 4)]
    assert sizes(compute(s)) == [("r0", 1), ("r1", 1), ("r2", 4)]


def test_what_can_never_fit_is_refused_with_the_numbers():
    s = scheduler(pages=8)
    make(s, 0, [1] * 25)
    with pytest.raises(RequestError, match="request r1: 26 prompt tokens and max_tokens 8 need room for 33 tokens, and the whole KV cache holds 32"):
        make(s, 1, [1] * 26)
    assert s.num_waiting == 1


def test_finishing_takes_a_sequence_from_wherever_it_is():
    s = scheduler(seqs=1)
    a, b = make(s, 0, [1] * 5), make(s, 1, [2] * 5)
    compute(s)
    s.finish(b)
    s.finish(a)
    assert (s.running, s.waiting, s.schedule()) == ([], [], [])
    s.check_integrity()
