"""The sequences of one request that search for the most probable continuations, and how their pages follow them. No torch."""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from .beam_search import BeamSearch, Step
from .request import Request, Sequence, Status, TokenLogprob
from .scheduler import Scheduler

Candidates = list[tuple[int, float]]
"""The most probable next tokens and their log-probabilities, best first."""


class Beam(NamedTuple):
    """A running continuation: its sequence, what it has said so far, and what the model says next."""

    sequence: Sequence
    output: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # of the output, if the request wants them
    candidates: Candidates


class Answer(NamedTuple):
    """A continuation that was found; `score`: its log-probability by length ** length_penalty."""

    score: float
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


class Beams:
    """All beams of a request go on together: each reports its candidates, and when all have, the next beams are chosen.

    A beam that goes on in several ways keeps its pages for the first of them; the others share the full ones and get a copy of the
    one that is not full. A beam that does not go on gives its pages back.
    """

    def __init__(self, request: Request, search: BeamSearch[Beam]) -> None:
        self.request, self.search = request, search
        self._running: dict[Sequence, tuple[Beam, float]] = {}  # with the sums of their log-probabilities
        self._reported = 0
        self._numbers = count(1)

    def begin(self, seq: Sequence) -> None:
        """With the sequence that computes the prompt."""
        self._running = {seq: (Beam(seq, (), (), []), 0.0)}

    @property
    def sequences(self) -> list[Sequence]:
        """Of the running beams."""
        return list(self._running)

    def report(self, seq: Sequence, candidates: Candidates) -> bool:
        """What the model says after a running beam; whether all beams have reported."""
        beam, score = self._running[seq]
        self._running[seq] = beam._replace(candidates=candidates), score
        self._reported += 1
        return self._reported == len(self._running)

    def advance(self, scheduler: Scheduler) -> None:
        """Choose the next beams; there are none when the search is done."""
        steps = self.search.advance([(beam, score, beam.candidates) for beam, score in self._running.values()])
        parents = {step.parent.sequence for step in steps}
        for seq in self._running:
            if seq not in parents:
                scheduler.finish(seq)
        running: dict[Sequence, tuple[Beam, float]] = {}
        for step in steps:
            seq = step.parent.sequence
            if seq in running:
                seq = self._fork(step)
                scheduler.fork(step.parent.sequence, seq)
            else:
                scheduler.choose(seq, step.token)
            running[seq] = Beam(seq, *self._said(step), []), step.score
        self._running, self._reported = running, 0

    def answers(self) -> list[Answer]:
        """What was found, best first, when the search is done."""
        return [Answer(score, *self._said(step)) for score, step in self.search.answers]

    def _fork(self, step: Step[Beam]) -> Sequence:
        seq, number = step.parent.sequence, next(self._numbers)
        return replace(
            seq, index=number, order=(*seq.order[:-1], number), known=array("i", [*self.request.prompt_token_ids, *step.parent.output, step.token]),
            row=-1, rows=None, status=Status.WAITING, last_step=-1, page_hashes={size: list(known) for size, known in seq.page_hashes.items()},
        )  # fmt: skip

    def _said(self, step: Step[Beam]) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        """The output up to a step, and its log-probabilities if they are wanted."""
        beam, wanted = step.parent, self.request.params.logprobs
        output = (*beam.output, step.token)
        if wanted is None:
            return output, ()
        return output, (*beam.logprobs, TokenLogprob(step.token, dict(beam.candidates)[step.token], tuple(beam.candidates[:wanted])))
