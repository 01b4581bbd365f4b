"""Beam search: the most probable continuations, kept in parallel. No torch.

As in transformers (`num_beams`, without sampling): of all one-token continuations of the running beams the best
(1 + number of stop tokens) · width are looked at. Those that end compete for the `width` answers with their scores divided by
length ** length_penalty, if they are among the best `width`; the best that go on are the next beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np

EarlyStopping = bool | Literal["never"]
T = TypeVar("T")


class Step(NamedTuple, Generic[T]):
    """One more token after `parent`, a running beam; `score` the sum of log-probabilities."""

    parent: T
    token: int
    score: float


@dataclass
class BeamSearch(Generic[T]):
    """The search of one request. `T` names a beam: anything of the caller's.

    `early_stopping` True: end with `width` answers; False: when the best running beam, at its present length, is worse than all of
    them; "never": when it is worse at the length that would favour it most.
    """

    width: int
    max_tokens: int
    stops: frozenset[int]
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    done: bool = False
    answers: list[tuple[float, Step[T]]] = field(default_factory=list)  # score by length and last step, best first
    _length: int = 0
    _improvable: bool = True

    @property
    def num_candidates(self) -> int:
        """Most probable tokens that `advance` needs of each beam."""
        return max(2, 1 + len(self.stops)) * self.width

    def advance(self, beams: Sequence[tuple[T, float, Sequence[tuple[int, float]]]]) -> list[Step[T]]:
        """The next beams, best first, after what the model says of the running ones: (beam, score, its most probable tokens with log-probabilities).

        New answers are in `answers`. No next beams when the search is `done`.
        """
        steps = [Step(beam, token, float(np.float32(score) + np.float32(logprob))) for beam, score, tokens in beams for token, logprob in tokens]
        steps = sorted(steps, key=lambda s: -s.score)[: self.num_candidates]
        self._length += 1
        ends = [s.token in self.stops or self._length == self.max_tokens for s in steps]
        if self._improvable and not (self.early_stopping is True and len(self.answers) == self.width):
            ended = [(self._normalized(s.score, self._length), s) for s, end in zip(steps[: self.width], ends, strict=False) if end]
            self.answers = sorted(self.answers + ended, key=lambda a: -a[0])[: self.width]
        running = [s for s, end in zip(steps, ends, strict=True) if not end][: self.width]
        if running and len(self.answers) == self.width:
            longest = self.early_stopping == "never" and self.length_penalty > 0
            best = self._normalized(running[0].score, self.max_tokens if longest else self._length)
            self._improvable = self._improvable and best > self.answers[-1][0]
        self.done = not running or not self._improvable or (self.early_stopping is True and len(self.answers) == self.width)
        return [] if self.done else running

    def _normalized(self, score: float, length: int) -> float:
        return score / length**self.length_penalty
