"""Continuous batching (Yu et al. 2022, Orca) with chunked prefill (Agrawal et al. 2024, Sarathi). No torch.

Each step has a budget of tokens. Sequences that decode take theirs first, then running prefills their next chunk, then
waiting sequences are admitted in order. When pages run out, the sequence that comes last in order gives up its own and
is computed again later. One that waits takes pages and rows from running ones of a lower priority.

A step is scheduled as if those in flight were done: `launched` says that it is on its way, `collected` that it was.
"""

from __future__ import annotations

import heapq
from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from .kv_cache import KVCache
from .request import RequestError, Sequence, Status
from .rows import Rows

_ROW = attrgetter("row")


class Step(NamedTuple):
    """What a step computes: for each of its sequences the `num_new` tokens after the first `num_computed`; arrays [S]."""

    number: int  # of launched steps, from 0
    sequences: list[Sequence]
    rows: np.ndarray
    num_tokens: np.ndarray  # that they have, with a pending one
    num_computed: np.ndarray
    end: np.ndarray  # tokens that are ever computed
    num_new: np.ndarray
    total: int  # of `num_new`
    lengths: np.ndarray  # tokens that are computed after it
    num_prompt: np.ndarray
    flags: np.ndarray  # of `Rows`
    any_flags: int  # those that some sequence has
    pending: np.ndarray  # the row of the last step's samples with the sequence's newest token; −1 when it is known
    samples: np.ndarray  # whether the tokens end with this step, which yields the next one
    num_sampled: int  # sequences where they do
    prompt_rows: list[tuple[Sequence, range]]  # positions whose logits score the prompt

    @property
    def num_rows(self) -> int:
        """Rows of logits: one for each sequence that samples, then everybody's prompt rows."""
        return self.num_sampled + sum(len(positions) for _, positions in self.prompt_rows)

    def sampled(self, values: np.ndarray) -> np.ndarray:
        """Of `values` [S], those of the sequences that sample."""
        return values if self.num_sampled == len(values) else values[self.samples]


@dataclass
class _Budget:
    """A step being filled: who computes how much, and how many tokens and rows of logits are left."""

    rows_of: Rows
    tokens: int
    rows: int
    items: dict[Sequence, int] = field(default_factory=dict)

    def decode(self, sequences: list[Sequence]) -> None:
        """One token and one row each."""
        self.items |= dict.fromkeys(sequences, 1)
        self.tokens -= len(sequences)
        self.rows -= len(sequences)

    def chunk(self, seq: Sequence) -> int:
        """The largest number of new tokens that `seq` can have now."""
        left = int(self.rows_of.num_tokens[seq.row] - self.rows_of.num_computed[seq.row])
        num_new = min(left, self.tokens)
        if seq.wants_prompt_logprobs:  # at most one row a token
            return min(num_new, self.rows)
        return num_new if self.rows > 0 or num_new < left else num_new - 1

    def add(self, seq: Sequence, num_new: int) -> None:
        self.items[seq] = num_new
        self.tokens -= num_new
        self.rows -= self._num_rows(seq, num_new)

    def discard(self, seq: Sequence) -> None:
        """Take `seq`, which still has its row, out again."""
        num_new = self.items.pop(seq, 0)
        if num_new:
            self.tokens += num_new
            self.rows += self._num_rows(seq, num_new)

    def _num_rows(self, seq: Sequence, num_new: int) -> int:
        computed = int(self.rows_of.num_computed[seq.row])
        return (computed + num_new == self.rows_of.num_tokens[seq.row]) + len(seq.prompt_rows(computed, num_new))


class Scheduler:
    """Decides what each step computes. At most `max_num_rows` rows of logits a step (0: as many as tokens)."""

    def __init__(self, cache: KVCache, *, max_num_seqs: int, max_num_batched_tokens: int, max_num_rows: int = 0) -> None:
        self.cache, self.rows = cache, cache.rows
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_rows = max_num_rows or max_num_batched_tokens
        self.running: list[Sequence] = []  # in order
        self._running_rows: np.ndarray | None = None  # theirs; None when they have changed
        self.num_preemptions = 0
        self.num_launched = self.num_collected = 0  # steps
        self._waiting: list[tuple[tuple[float, ...], Sequence]] = []  # a heap

    @property
    def waiting(self) -> list[Sequence]:
        """In order."""
        return [seq for _, seq in sorted(self._waiting, key=lambda w: w[0])]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, seq: Sequence) -> None:
        """Queue `seq`. RequestError when it could never run to its end, even alone."""
        if seq.last > self.cache.capacity:  # the last token is never fed back
            raise RequestError(
                f"request {seq.request.id}: {seq.num_prompt} prompt tokens and max_tokens {seq.max_tokens} need room for {seq.last} tokens, "
                f"and the whole KV cache holds {self.cache.capacity}; lower max_tokens, shorten the prompt or give the cache more memory"
            )
        self._wait(seq)

    def _wait(self, seq: Sequence) -> None:
        seq.status = Status.WAITING
        heapq.heappush(self._waiting, (seq.order, seq))

    def _run(self, seq: Sequence) -> None:
        seq.status = Status.RUNNING
        insort(self.running, seq, key=lambda s: s.order)
        self._running_rows = None

    def _rows_of_running(self) -> np.ndarray:
        if self._running_rows is None:
            self._running_rows = np.fromiter(map(_ROW, self.running), np.intp, len(self.running))
        return self._running_rows

    def fork(self, seq: Sequence, child: Sequence) -> None:
        """Begin `child`, whose tokens are those that `seq` has computed and one more: with their KV, or if there is no room waiting to compute them."""
        if seq.status is Status.RUNNING and len(self.running) < self.max_num_seqs and self.cache.fork(seq, child):
            self._run(child)
        else:
            self._wait(child)

    def choose(self, seq: Sequence, token: int) -> None:
        """The next token of a beam, which has computed all others."""
        seq.append(len(seq.token_ids), token)
        if seq.status is Status.RUNNING:
            self.rows.num_tokens[seq.row] += 1
        else:
            self._wait(seq)

    def schedule(self) -> Step | None:
        """What the next step computes; None when nothing can be. Order: decoding, prefilling, newly admitted.

        At most one step may be in flight, or a pending token would not be among the samples of the last one.
        """
        assert self.num_launched - self.num_collected <= 1
        return self._decode() or self._fill()

    def _decode(self) -> Step | None:
        """The next step where nobody waits and nobody has a prompt to compute, as a rule; None where it takes more to find it."""
        if self._waiting or not 0 < len(self.running) <= min(self.max_num_batched_tokens, self.max_num_rows):
            return None
        sequences, rows = list(self.running), self._rows_of_running()
        facts = self.rows.facts.take(rows, 1)
        num_tokens, num_computed, end, room, *_ = facts
        uncomputed = np.minimum(num_tokens, end) - num_computed
        decodes = uncomputed == 1
        if np.count_nonzero(decodes) < len(rows):
            found = np.flatnonzero(decodes)
            if not found.size or (uncomputed > 1).any():
                return None
            sequences, rows, facts = [sequences[i] for i in found.tolist()], rows[found], facts[:, found]
            _, num_computed, _, room, *_ = facts
        for i in (room <= num_computed).nonzero()[0].tolist():
            if not self.cache.grow(sequences[i], int(num_computed[i]) + 1):
                return None
        return self._step(sequences, rows, facts, np.ones(len(rows), np.int64), len(rows))

    def _fill(self) -> Step | None:
        """The next step, its budget given to one after the other."""
        budget = _Budget(self.rows, self.max_num_batched_tokens, self.max_num_rows)
        preemptions = self.num_preemptions
        if self.running:
            self._continue(budget)
        # What was just taken from a running sequence must not go to a new one.
        if self.num_preemptions == preemptions:
            self._admit(budget)
        if self.num_launched == self.num_collected:
            # Running beams wait for others of theirs that wait for room: those that come last make it.
            while self._waiting and self.running and not budget.items:
                self._preempt(budget)
                self._admit(budget)
        if not budget.items:
            return None
        return self._step_of(budget.items)

    def _continue(self, budget: _Budget) -> None:
        """Those that run: who decodes first, then prompts."""
        rows = self._rows_of_running()
        uncomputed = self.rows.uncomputed(rows)
        decoding = np.flatnonzero(uncomputed == 1)[: min(budget.tokens, budget.rows)]
        prefilling = [self.running[i] for i in np.flatnonzero(uncomputed > 1).tolist()]
        full = decoding[self.rows.room[rows[decoding]] <= self.rows.num_computed[rows[decoding]]]
        starved = [self.running[i] for i in full.tolist()]
        budget.decode([self.running[i] for i in decoding.tolist()])
        for seq in starved:
            if seq.status is Status.RUNNING:
                self._make_room(seq, 1, budget)
        for seq in prefilling:
            num_new = budget.chunk(seq) if seq.status is Status.RUNNING else 0
            if num_new > 0 and self._make_room(seq, num_new, budget):
                budget.add(seq, num_new)

    def _step_of(self, items: dict[Sequence, int]) -> Step:
        """In which each sequence has so many tokens."""
        sequences = list(items)
        rows = np.fromiter(map(_ROW, sequences), np.intp, len(sequences))
        num_new = np.fromiter(items.values(), np.int64, len(sequences))
        return self._step(sequences, rows, self.rows.facts.take(rows, 1), num_new, sum(items.values()))

    def _step(self, sequences: list[Sequence], rows: np.ndarray, facts: np.ndarray, num_new: np.ndarray, total: int) -> Step:
        """`facts` of `rows`, as `Rows` has them."""
        num_tokens, num_computed, end, _, num_prompt, sampled_in, sampled_row, flags, _ = facts
        pending = np.where(sampled_in >= self.num_collected, sampled_row, -1)
        lengths = num_computed + num_new
        samples, any_flags = lengths == num_tokens, int(np.bitwise_or.reduce(flags))
        scoring = np.flatnonzero(flags & Rows.SCORES).tolist() if any_flags & Rows.SCORES else []
        prompt_rows = [(sequences[i], sequences[i].prompt_rows(int(num_computed[i]), int(num_new[i]))) for i in scoring]
        return Step(
            self.num_launched, sequences, rows, num_tokens, num_computed, end, num_new, total, lengths, num_prompt, flags, any_flags, pending, samples,
            int(np.count_nonzero(samples)), prompt_rows,
        )  # fmt: skip

    def _admit(self, budget: _Budget) -> None:
        victims = set()
        while self._waiting and budget.tokens > 0 and budget.rows > 0:
            seq = self._waiting[0][1]
            # One that was preempted while a step in flight has it may not know its newest token yet.
            if seq.last_step >= self.num_collected or seq in victims:
                break
            # A page for each running sequence stays spare, or the newcomer would soon be preempted.
            while not (admitted := len(self.running) < self.max_num_seqs and self.cache.admit(seq, spare=len(self.running))):
                if not self.running or self.running[-1].request.priority <= seq.request.priority:
                    break
                victims.add(self._preempt(budget))
            if not admitted:
                break
            heapq.heappop(self._waiting)
            self._run(seq)
            num_new = budget.chunk(seq)
            self.cache.grow(seq, int(self.rows.num_computed[seq.row]) + num_new)
            budget.add(seq, num_new)

    def _make_room(self, seq: Sequence, num_new: int, budget: _Budget) -> bool:
        """Pages for `num_new` more tokens, from those that come last if need be; False when `seq` itself is the last."""
        while not self.cache.grow(seq, int(self.rows.num_computed[seq.row]) + num_new):
            if self._preempt(budget) is seq:
                return False
        return True

    def _preempt(self, budget: _Budget) -> Sequence:
        """Take row and pages from the running sequence that comes last."""
        victim = self.running.pop()
        self._running_rows = None
        budget.discard(victim)
        row = victim.row
        victim.last_step = int(self.rows.launched_in[row])
        undecided = bool(self.rows.flags[row] & Rows.CHOSEN) and not self.rows.uncomputed(np.array([row]))[0]
        self.cache.release(victim)
        if undecided:
            victim.status = Status.PARKED
        else:
            self._wait(victim)
        self.num_preemptions += 1
        return victim

    def launched(self, step: Step) -> None:
        """The step is on its way: the next one is scheduled as if it were done. Its samples are pending from now on."""
        state, sampled = self.rows, step.sampled(step.rows)
        state.num_computed[step.rows] = step.lengths
        state.launched_in[step.rows] = state.sampled_in[sampled] = step.number
        state.sampled_row[sampled] = np.arange(len(sampled))
        state.num_tokens[sampled] = step.sampled(step.num_tokens) + 1
        if step.any_flags & Rows.CHOSEN:  # theirs is not known, nor on the device
            chosen = sampled[step.sampled(step.flags) & Rows.CHOSEN != 0]
            state.sampled_in[chosen] = -1
            state.num_tokens[chosen] -= 1
        self.num_launched += 1
        self.cache.launched(step.sequences, step.rows, step.lengths, step.num_tokens - (step.pending >= 0))

    def collected(self) -> None:
        """The oldest step in flight was computed. Its samples are appended, and sequences finished, after this."""
        self.num_collected += 1

    def finish(self, seq: Sequence) -> None:
        """Take `seq` out, wherever it is, and free what it holds."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self._running_rows = None
            self.cache.release(seq)
        elif seq.status is Status.WAITING:
            self._waiting = [w for w in self._waiting if w[1] is not seq]
            heapq.heapify(self._waiting)
        seq.status = Status.FINISHED

    def check_integrity(self) -> None:
        """AssertionError when a sequence is in two places, out of order, or holds pages that it should not."""
        self.cache.check_integrity()
        waiting = [seq for _, seq in self._waiting]
        assert set(self.cache.sequences.values()) == set(self.running)
        assert len({*self.running, *waiting}) == len(self.running) + len(waiting)
        assert all(s.status is Status.RUNNING for s in self.running) and all(s.status is Status.WAITING and s.row < 0 for s in waiting)
        assert [s.order for s in self.running] == sorted(s.order for s in self.running)
        assert len(self.running) <= self.max_num_seqs
        rows = np.array([s.row for s in self.running], np.intp)
        assert self._rows_of_running().tolist() == rows.tolist()
        assert all(self.rows.tokens[s.row, : len(s.token_ids)].tolist() == s.token_ids.tolist() for s in self.running)
        awaited = self.rows.num_tokens[rows] - np.array([len(s.token_ids) for s in self.running], np.int32)
        assert ((awaited > 0) == (self.rows.sampled_in[rows] >= self.num_collected)).all()
        assert (awaited >= 0).all() and (awaited <= self.num_launched - self.num_collected).all()
        chosen = self.rows.flags[rows] & Rows.CHOSEN != 0
        assert (self.rows.num_computed[rows] < self.rows.num_tokens[rows] + chosen).all()
        assert (self.rows.uncomputed(rows) >= (awaited == 0) & ~chosen).all()  # only one whose last token is awaited has nothing left to compute
