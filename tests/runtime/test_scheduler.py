"""The scheduler as a state machine, and its promises one by one."""

from array import array

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ingot.runtime.kv_cache import GroupInfo, KVCache
from ingot.runtime.records import sampling_record
from ingot.runtime.request import Request, RequestError, SamplingParams, Sequence, Status, TokenLogprob
from ingot.runtime.scheduler import Scheduler, Step, _Budget

TOKENS, ROWS, SEQS = 24, 6, 5


def make(scheduler: Scheduler, number: int, prompt: list[int], max_tokens: int = 8, priority: int = 0, scores: bool = False) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if scores else None)
    seq = Sequence(Request(f"r{number}", prompt, params, priority), 0, (priority, number), max_tokens, array("i", prompt), sampling_record(params, 0))
    scheduler.add(seq)
    return seq


def computed(scheduler: Scheduler, seq: Sequence) -> int:
    return int(scheduler.rows.num_computed[seq.row])


def collect(scheduler: Scheduler, step: Step, token: int = 1) -> list[Sequence]:
    """The step's samples are `token`; those who are complete with it."""
    for seq, positions in step.prompt_rows:
        for position in positions:
            if seq.status is not Status.FINISHED:
                assert position == len(seq.prompt_logprobs) - 1
                seq.add_prompt_logprob(TokenLogprob(seq.token_ids[position + 1], -1.0))
    scheduler.collected()
    complete = []
    for i in np.flatnonzero(step.samples).tolist():
        seq = step.sequences[i]
        if seq.status is not Status.FINISHED:
            assert not seq.wants_prompt_logprobs
            seq.append(len(seq.token_ids), token)
            if seq.num_output == seq.max_tokens:
                scheduler.finish(seq)
                complete.append(seq)
    return complete


def compute(scheduler: Scheduler, token: int = 1) -> list[tuple[Sequence, int]]:
    """One step, nothing in flight: what was scheduled. Sequences that are complete finish."""
    step = scheduler.schedule()
    if step is None:
        return []
    scheduler.launched(step)
    collect(scheduler, step, token)
    return list(zip(step.sequences, step.num_new.tolist(), strict=True))


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, are aborted or stop, and steps are launched and collected, at most two in flight, over pools so small that
    sequences are preempted and prefixes evicted."""

    def __init__(self) -> None:
        super().__init__()
        groups = {"full": GroupInfo("page", 4, 14), "window7": GroupInfo("page", 2, 17, window=7)}
        self.scheduler = Scheduler(KVCache(groups, SEQS, 64, max_num_new=TOKENS), max_num_seqs=SEQS, max_num_batched_tokens=TOKENS, max_num_rows=ROWS)
        self.alive: list[Sequence] = []
        self.in_flight: list[Step] = []
        self.number = 0

    @rule(stem=st.integers(0, 2), length=st.integers(1, 36), last=st.integers(0, 3), max_tokens=st.integers(1, 16), priority=st.integers(0, 1),
          scores=st.booleans())  # fmt: skip
    def arrive(self, stem: int, length: int, last: int, max_tokens: int, priority: int, scores: bool) -> None:
        self.number += 1
        prompt = [(stem * i) % 3 for i in range(length)] + [last]
        self.alive.append(make(self.scheduler, self.number, prompt, max_tokens, priority, scores))

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 50))
    def end(self, which: int) -> None:
        """By an abort, or by a stop that the tokens collected so far have shown."""
        self.scheduler.finish(self.alive.pop(which % len(self.alive)))

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule()
    def launch(self) -> None:
        scheduler, state = self.scheduler, self.scheduler.rows
        running = {s for s in self.alive if s.status is Status.RUNNING}
        preemptions = scheduler.num_preemptions
        first = min(self.alive, key=lambda s: s.order, default=None)
        before = {s: computed(scheduler, s) for s in running}
        end = {s: int(state.uncomputed(np.array([s.row]))[0]) for s in running}
        sampled = {s for f in self.in_flight for s, yes in zip(f.sequences, f.samples.tolist(), strict=True) if yes and s in running}
        flying = {s for f in self.in_flight for s in f.sequences}

        step = scheduler.schedule()
        preempted = {s for s in running if s.status is Status.WAITING}
        assert len(preempted) == scheduler.num_preemptions - preemptions
        if first is not None and first in running:
            assert first.status is Status.RUNNING  # so that somebody always gets on
        if step is None:
            # nobody, or all that there are wait for a step in flight: for their newest token, or for the pages of one that ends with it
            assert not self.alive or (self.in_flight and all(end[s] == 0 for s in running - preempted))
            return
        scheduled = list(zip(step.sequences, step.num_new.tolist(), strict=True))
        for i, (seq, n) in enumerate(scheduled):
            assert seq.status is Status.RUNNING
            assert step.num_computed[i] == computed(scheduler, seq) == before.get(seq, computed(scheduler, seq))
            known = len(seq.token_ids) + (seq in sampled)
            assert 1 <= n <= known - step.num_computed[i]
            assert step.samples[i] == (step.num_computed[i] + n == known)
            assert step.num_computed[i] + n < seq.num_prompt + seq.max_tokens  # the last token is never fed back
            assert (step.pending[i] >= 0) == (seq in sampled)
            if seq in sampled:
                last = self.in_flight[-1]
                assert [s for s, yes in zip(last.sequences, last.samples.tolist(), strict=True) if yes][step.pending[i]] is seq
            if seq not in running:
                assert seq not in flying  # what it said there is not known yet
        assert sum(n for _, n in scheduled) <= TOKENS
        assert step.num_rows == sum(len(p) for _, p in step.prompt_rows) + step.samples.sum() <= ROWS
        assert len({s for s, _ in scheduled}) == len(scheduled)
        kept = [s for s, _ in scheduled if s in running]
        if preempted:
            new = {s.request.priority for s, _ in scheduled if s not in running}
            assert not new or min(new) < min(s.request.priority for s in preempted)  # others give way to higher priority alone
            assert max(s.order for s in scheduler.running) < min(s.order for s in preempted)
        # Decoding goes before prefilling, and that before admission.
        decodes = [end[s] == 1 for s in kept]
        assert decodes == sorted(decodes, reverse=True)
        assert [s for s, _ in scheduled][: len(kept)] == kept
        scheduler.launched(step)
        self.in_flight.append(step)

    @precondition(lambda self: self.in_flight)
    @rule(token=st.integers(0, 2))
    def collect(self, token: int) -> None:
        for seq in collect(self.scheduler, self.in_flight.pop(0), token):
            self.alive.remove(seq)

    @precondition(lambda self: self.in_flight)
    @rule()
    def fail(self) -> None:
        """The oldest step cannot be trusted: all its sequences end, and those of the step after it."""
        for step in self.in_flight:
            for seq in step.sequences:
                if seq.status is not Status.FINISHED:
                    self.alive.remove(seq)
                    self.scheduler.finish(seq)
        self.scheduler.cache.forget_prefixes()
        self.in_flight.pop(0)
        self.scheduler.collected()

    @invariant()
    def holds(self) -> None:
        self.scheduler.check_integrity()
        assert {*self.scheduler.running, *self.scheduler.waiting} == set(self.alive)

    def teardown(self) -> None:
        """Everybody ends, and nothing is held then."""
        for _ in range(2000):
            if not self.alive and not self.in_flight:
                break
            if len(self.in_flight) < 2:
                self.launch()
            if self.in_flight:
                self.collect(1)
        self.holds()
        assert not self.alive
        assert all(p.num_used == 0 for p in self.scheduler.cache.pools.values())


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.nightly
class TestManySchedulerMachines(SchedulerMachine.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=40, deadline=None, derandomize=False)


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
    assert b.row == -1
    said = b.num_output
    assert said > 0
    while a.status is Status.RUNNING:
        compute(s)
    assert sizes(compute(s)) == [("r1", 9 + said)]


def test_the_last_gives_way_to_one_whose_end_is_still_in_flight():
    """Then nothing is left to compute until that step is collected, and nobody is stuck."""
    s = scheduler(pages=5, caching=False)
    ends = make(s, 0, [1] * 10, max_tokens=3)
    late = make(s, 1, [2] * 6, max_tokens=8)
    compute(s)
    step = s.schedule()
    while ends.num_output < 2:
        s.launched(step)
        collect(s, step)
        step = s.schedule()
    s.launched(step)
    assert s.schedule() is None
    assert (ends.status, late.status) == (Status.RUNNING, Status.WAITING)
    assert collect(s, step) == [ends]
    assert [name for name, _ in sizes(compute(s))] == ["r1"]


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
    s = scheduler()
    seq = make(s, 0, [0] * 12, scores=True)
    assert s.cache.admit(seq)
    budget = _Budget(s.rows, 20, 9)
    budget.add(seq, 9)
    assert (budget.tokens, budget.rows, budget.items) == (11, 0, {seq: 9})
    budget.discard(seq)
    budget.discard(seq)
    assert (budget.tokens, budget.rows, budget.items) == (20, 9, {})


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
    assert computed(s, b) == length
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
    assert (s.running, s.waiting, s.schedule()) == ([], [], None)
    s.check_integrity()


def launch(s: Scheduler) -> Step:
    step = s.schedule()
    assert step is not None
    s.launched(step)
    return step


def test_a_pending_token_is_counted_and_found_in_the_last_steps_samples():
    s = scheduler(tokens=12)
    a, b = make(s, 0, [1] * 4), make(s, 1, [2] * 10)
    first = launch(s)
    assert (first.pending.tolist(), first.samples.tolist()) == ([-1, -1], [True, False])
    second = launch(s)  # b's chunk ends its prompt
    assert second.sequences == [a, b]
    assert (second.num_computed.tolist(), second.pending.tolist(), second.samples.tolist()) == ([4, 8], [0, -1], [True, True])
    collect(s, first, 7)
    third = launch(s)
    assert (third.num_computed.tolist(), third.pending.tolist()) == ([5, 10], [0, 1])
    collect(s, second, 8)
    assert ([*a.token_ids[4:]], [*b.token_ids[10:]]) == ([7, 8], [8])
    s.check_integrity()


def test_nothing_is_launched_beyond_the_length_limit():
    s = scheduler()
    make(s, 0, [1] * 4, max_tokens=2)
    steps = [launch(s), launch(s)]
    assert s.num_launched - s.num_collected == 2
    collect(s, steps[0])
    assert s.schedule() is None
    collect(s, steps[1])
    assert (s.running, s.cache.pools["full"].num_used) == ([], 0)


def test_one_that_was_preempted_in_flight_waits_for_its_token():
    s = scheduler(pages=4, caching=False)
    a, b = make(s, 0, [1] * 8), make(s, 1, [2] * 4)
    flying = launch(s)
    other = launch(s)  # a takes the last page but none is left for b
    assert other.sequences == [a]
    assert (b.status, b.last_step) == (Status.WAITING, 0)
    collect(s, flying, 5)
    assert [*b.token_ids[4:]] == [5]
    s.finish(a)
    again = launch(s)
    assert (again.sequences, again.num_new.tolist()) == ([b], [5])
    collect(s, other)
    s.check_integrity()


def test_a_row_that_was_given_to_another_is_left_alone_when_its_old_step_is_collected():
    s = scheduler(seqs=1)
    a, b = make(s, 0, [1] * 9), make(s, 1, [2] * 9)
    flying = launch(s)
    s.finish(a)
    new = launch(s)
    assert (new.sequences, new.rows.tolist(), new.pending.tolist()) == ([b], flying.rows.tolist(), [-1])
    collect(s, flying)
    assert [*a.token_ids] == [1] * 9
    s.check_integrity()
    collect(s, new)
    assert [*b.token_ids] == [2] * 9 + [1]
    s.check_integrity()


def test_priority_takes_pages_from_running_sequences():
    s = scheduler(pages=10, caching=False)
    low, lower = make(s, 0, [1] * 12, priority=1), make(s, 1, [2] * 12, priority=2)
    compute(s)
    equal = make(s, 2, [3] * 16, priority=2)
    compute(s)
    assert [q.request.id for q in s.running] == ["r0", "r1"]
    high = make(s, 3, [4] * 16, priority=0)
    assert sizes(compute(s)) == [("r0", 1), ("r3", 16)]
    assert [q.request.id for q in s.running] == ["r3", "r0"]
    assert (low.status, lower.status, equal.status) == (Status.RUNNING, Status.WAITING, Status.WAITING)
    highest = make(s, 4, [5] * 33, priority=-1)
    assert sizes(compute(s)) == [("r4", 32)]
    assert (high.status, low.status, highest.status) == (Status.WAITING, Status.WAITING, Status.RUNNING)
    s.check_integrity()


def test_priority_takes_rows_too():
    s = scheduler(seqs=2)
    make(s, 0, [1] * 4, priority=1), make(s, 1, [2] * 4, priority=1)
    compute(s)
    make(s, 2, [3] * 4)
    assert sizes(compute(s)) == [("r0", 1), ("r2", 4)]
    assert [q.request.id for q in s.waiting] == ["r1"]
