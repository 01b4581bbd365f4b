"""Continuous batching (Yu et al. 2022, Orca) with chunked prefill (Agrawal et al. 2024, Sarathi). No torch.

Each step has a budget of tokens. Sequences that decode take theirs first, then running prefills their next chunk, then
waiting sequences are admitted in order. When pages run out, the sequence that comes last in order gives up its own and
is computed again later.
"""

from __future__ import annotations

import heapq
from bisect import insort
from dataclasses import dataclass, field
from typing import NamedTuple

from .kv_cache import KVCache
from .request import RequestError, Sequence, Status


class Scheduled(NamedTuple):
    """`sequence` computes its next `num_new` tokens in this step."""

    sequence: Sequence
    num_new: int


@dataclass
class _Step:
    """A step being filled: who computes how much, and what is left of the budgets."""

    tokens: int
    rows: int
    items: dict[Sequence, int] = field(default_factory=dict)

    def chunk(self, seq: Sequence) -> int:
        """The largest number of new tokens that `seq` can have now."""
        left = len(seq.token_ids) - seq.num_computed
        num_new = left if left < self.tokens else self.tokens
        if seq.wants_prompt_logprobs:  # at most one row a token
            return min(num_new, self.rows)
        return num_new if self.rows > 0 or num_new < left else num_new - 1

    def add(self, seq: Sequence, num_new: int) -> None:
        self.items[seq] = num_new
        self.tokens -= num_new
        self.rows -= self._num_rows(seq, num_new)

    def discard(self, seq: Sequence) -> None:
        num_new = self.items.pop(seq, 0)
        if num_new:
            self.tokens += num_new
            self.rows += self._num_rows(seq, num_new)

    def _num_rows(self, seq: Sequence, num_new: int) -> int:
        return seq.samples(num_new) + (len(seq.prompt_rows(num_new)) if seq.wants_prompt_logprobs else 0)


class Scheduler:
    """Decides what each step computes. At most `max_num_rows` rows of logits a step (0: as many as tokens)."""

    def __init__(self, cache: KVCache, *, max_num_seqs: int, max_num_batched_tokens: int, max_num_rows: int = 0) -> None:
        self.cache = cache
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_rows = max_num_rows or max_num_batched_tokens
        self.running: list[Sequence] = []  # in order
        self.num_preemptions = 0
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
        longest = seq.num_prompt + seq.max_tokens - 1  # the last token is never fed back
        if longest > self.cache.capacity:
            raise RequestError(
                f"request {seq.request.id}: {seq.num_prompt} prompt tokens and max_tokens {seq.max_tokens} need room for {longest} tokens, "
                f"and the whole KV cache holds {self.cache.capacity}; lower max_tokens, shorten the prompt or give the cache more memory"
            )
        heapq.heappush(self._waiting, (seq.order, seq))

    def schedule(self) -> list[Scheduled]:
        """What the next step computes; empty when nothing waits or runs. Order: decoding, prefilling, newly admitted."""
        step = _Step(self.max_num_batched_tokens, self.max_num_rows)
        preemptions = self.num_preemptions
        prefilling = [s for s in self.running if s.num_uncomputed > 1]
        decoding = [s for s in self.running if s.num_uncomputed == 1] if prefilling else list(self.running)
        for seq in decoding + prefilling:
            num_new = step.chunk(seq) if seq.status is Status.RUNNING else 0
            if num_new > 0 and self._make_room(seq, num_new, step):
                step.add(seq, num_new)
        # What was just taken from a running sequence must not go to a new one.
        if self.num_preemptions == preemptions:
            self._admit(step)
        return [Scheduled(seq, num_new) for seq, num_new in step.items.items()]

    def _admit(self, step: _Step) -> None:
        while self._waiting and len(self.running) < self.max_num_seqs and step.tokens > 0 and step.rows > 0:
            seq = self._waiting[0][1]
            # A page for each running sequence stays spare, or the newcomer would soon be preempted.
            if not self.cache.admit(seq, spare=len(self.running)):
                break
            heapq.heappop(self._waiting)
            seq.status = Status.RUNNING
            insort(self.running, seq, key=lambda s: s.order)
            num_new = step.chunk(seq)
            self.cache.grow(seq, seq.num_computed + num_new)
            step.add(seq, num_new)

    def _make_room(self, seq: Sequence, num_new: int, step: _Step) -> bool:
        """Pages for `num_new` more tokens, from those that come last if need be; False when `seq` itself is the last."""
        while not self.cache.grow(seq, seq.num_computed + num_new):
            victim = self.running.pop()
            step.discard(victim)
            self.cache.release(victim)
            victim.status = Status.WAITING
            heapq.heappush(self._waiting, (victim.order, victim))
            self.num_preemptions += 1
            if victim is seq:
                return False
        return True

    def update(self, scheduled: list[Scheduled]) -> None:
        """The step was computed. Sampled tokens are appended, and sequences finished, after this."""
        for seq, num_new in scheduled:
            if seq.status is Status.RUNNING:
                self.cache.commit(seq, num_new)

    def finish(self, seq: Sequence) -> None:
        """Take `seq` out, wherever it is, and free what it holds."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
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
        assert all(s.num_uncomputed >= 1 for s in self.running)
