"""Tokens to text while they arrive."""

from __future__ import annotations

import codecs

import numpy as np

from .tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence, as far as it is decided.

    A character is given out when all its bytes are there; what could be the beginning of a stop string, when it is clear that
    it is not. Invalid bytes become U+FFFD. The text ends before the stop string that is complete first (of several at the same
    place the longest), whatever the tokens' boundaries. In the text of the first `min_tokens` tokens none is looked for.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        self.stopped: str | None = None  # the stop string that was found
        self._tokenizer, self._texts = tokenizer, tokenizer.texts
        self._stop, self._stop_characters = stop, frozenset("".join(stop))
        self._unstoppable = min_tokens  # tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.is_whole = True  # no bytes wait for the rest of their character
        self._held = ""

    def feed(self, token_id: int) -> str:
        """The text that this token decides; "" once stopped."""
        text = self._texts[token_id] if self.is_whole else None
        if text is None:
            text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
            self.is_whole = not self._utf8.getstate()[0]
        if not self._stop:
            return text
        if self._unstoppable > 0:
            self._unstoppable -= 1
            return text
        return self._decide(text)

    def finish(self) -> str:
        """What was held back, when no token will follow."""
        text = self._utf8.decode(b"", final=True)
        if self._stop:
            text = self._decide(text)
        text, self._held = text + self._held, ""
        return text

    def _decide(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(begin + len(s), -len(s), s) for s in self._stop if (begin := text.find(s)) >= 0]
        if found:
            end, _, self.stopped = min(found)
            self._held = ""
            return text[: end - len(self.stopped)]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        if text[-1:] not in self._stop_characters:  # as a rule
            return 0
        longest = min(len(text), max(len(s) for s in self._stop) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)


class KnownTexts:
    """What the tokens that came so far add to a text between whole characters: `texts` by token id, where `known`.

    Without a tokenizer no text has to be learned. Not known are tokens with parts of characters, tokens that stop a sequence, and negative ones, which are
    none.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._stops: set[int] = set()
        self.texts, self.known = np.full(vocab_size, "", object), np.zeros(vocab_size + 2, bool)  # the last two for 'logit_rules.NONE_LEFT' and its like
        self.known[:vocab_size] = tokenizer is None

    def stop_at(self, token_ids: frozenset[int]) -> None:
        """Some sequence ends with each of them."""
        new = token_ids - self._stops
        self._stops |= new
        self.known.put([*new], False, mode="clip")  # beyond the vocabulary: at none

    def learn(self, token_id: int) -> None:
        """It came."""
        if self._tokenizer is not None and not self.known[token_id] and token_id not in self._stops:
            text = self._tokenizer.texts[token_id]
            self.texts[token_id], self.known[token_id] = text, text is not None
