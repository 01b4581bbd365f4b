"""Counting the tokens of an answer."""

from __future__ import annotations

from collections.abc import Sequence

from ingot.runtime.request import Delta

from ..protocol.usage import PromptTokensDetails, Usage


class Tally:
    """The `usage` of an answer to `prompts` with `n` choices each, from the deltas so far."""

    def __init__(self, prompts: Sequence[list[int]], n: int) -> None:
        self._num_prompt = sum(map(len, prompts))
        self._n = n
        self._generated = 0
        self._cached: dict[int, int] = {}

    def add(self, choice: int, delta: Delta) -> None:
        self._generated += len(delta.token_ids)
        # Continuations after the first share its prompt's pages, which is no saving that the client knows of.
        if delta.usage is not None and choice % self._n == 0:
            self._cached[choice] = delta.usage.cached_tokens

    def usage(self) -> Usage:
        generated = self._generated
        details = PromptTokensDetails(cached_tokens=sum(self._cached.values()))
        return Usage(prompt_tokens=self._num_prompt, completion_tokens=generated, total_tokens=self._num_prompt + generated, prompt_tokens_details=details)
