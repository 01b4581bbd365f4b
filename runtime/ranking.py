"""Requests of whose continuations only the best are answered (`best_of`): nothing is said before all have ended. No torch."""

from __future__ import annotations

import msgspec

from .request import Delta, Usage


class Ranking:
    """Collects the deltas of `total` continuations, and answers with the `best`, by the sum of their tokens' log-probabilities."""

    def __init__(self, best: int, total: int) -> None:
        self._best, self._total = best, total
        self._deltas: dict[int, Delta] = {}  # what each continuation has said so far

    def add(self, delta: Delta) -> list[Delta]:
        """The answers once every continuation has ended: one delta each, best first, those that could not be finished last."""
        before = self._deltas.get(delta.index)
        self._deltas[delta.index] = delta if before is None else _joined(before, delta)
        ended = sum(d.finish_reason is not None for d in self._deltas.values())
        if ended < self._total:
            return []
        first = self._deltas[0]
        ranked = sorted(self._deltas.values(), key=lambda d: (d.finish_reason in ("abort", "error"), -(d.score or 0.0), d.index))
        answers = []
        for index, d in enumerate(ranked[: self._best]):
            assert d.usage is not None and first.usage is not None  # they come with the end
            usage = Usage(d.usage.prompt_tokens, first.usage.cached_tokens, d.usage.output_tokens)
            answers.append(msgspec.structs.replace(d, index=index, usage=usage, prompt_logprobs=first.prompt_logprobs if index == 0 else None))
        return answers


def _joined(a: Delta, b: Delta) -> Delta:
    logprobs = None if a.logprobs is None and b.logprobs is None else (a.logprobs or []) + (b.logprobs or [])
    prompt = a.prompt_logprobs if a.prompt_logprobs is not None else b.prompt_logprobs
    return msgspec.structs.replace(b, token_ids=a.token_ids + b.token_ids, text=a.text + b.text, logprobs=logprobs, prompt_logprobs=prompt)
