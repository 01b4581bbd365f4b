"""What requests ask of their logits before temperature and filters, as token ids; and which of it applies in a step. No torch.

Everything that depends on the newest token is a *condition*: that token may still be on the device when a step is packed. How
often a token has occurred is counted on the device too (`logits.py`), in a table with a line for each running sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .request import RequestError, SamplingParams, Sequence

IN_PROMPT = 1 << 24
"""Added to a token's count when the prompt has it; below are its occurrences in the output."""
NOT_FINITE, NONE_LEFT = -1, -2
"""In place of a token: the model's logits are not finite; the rules forbid every token."""

FIELDS = {
    "edit_rows": "i4", "edit_conditions": "i4", "edit_tokens": "i4", "edit_values": "f4",
    "penalty_rows": "i4", "penalty_lines": "i4", "repetition": "f4", "presence": "f4", "frequency": "f4",
    "new_lines": "i4", "seen_lines": "i4", "seen_tokens": "i4", "seen_counts": "i4",
    "restricted_rows": "i4", "allowed_in": "i4", "allowed_tokens": "i4",
}  # fmt: skip
"""The arrays of `LogitEdits`, all of one dimension. An edit adds its value to the logit of a token in a row, if its condition is −1 or the
row's newest token. Penalty rows read a line of the counts; new lines begin at zero and take what was seen so far. Of restricted rows
only the allowed tokens remain; `allowed_in` is an index into `restricted_rows`."""


@dataclass(frozen=True)
class LogitRules:
    """The rules of one request."""

    biased: np.ndarray  # int32 ids,
    bias: np.ndarray  # and what is added to their logits always; −inf forbids
    min_tokens: int
    stops: np.ndarray  # int32 ids that are forbidden until `min_tokens` tokens were generated
    bad_words: tuple[tuple[int, ...], ...]  # of two or more tokens: the last one is forbidden after the others
    allowed: np.ndarray | None  # int32 ids: all others are forbidden
    penalties: tuple[float, float, float] | None  # repetition, presence, frequency

    @classmethod
    def of(cls, params: SamplingParams, eos_token_ids: Iterable[int], bad_words: Iterable[list[int]], vocab_size: int) -> LogitRules | None:
        """The rules in `params`, None if there are none; `bad_words` as token ids. RequestError for ids beyond the vocabulary, or when no token is left."""
        words = [tuple(w) for w in bad_words]
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)} if params.min_tokens else set()
        for name, ids in (("logit_bias", params.logit_bias), ("allowed_token_ids", params.allowed_token_ids or ()), ("stop_token_ids", params.stop_token_ids)):
            wrong = next((t for t in ids if t >= vocab_size), None)
            if wrong is not None:
                raise RequestError(f"{name}: token {wrong} is not in the vocabulary of {vocab_size}", name)
        biases = [*params.logit_bias.items(), *((w[0], -np.inf) for w in words if len(w) == 1)]
        forbidden = {t for t, value in biases if value == -np.inf} | stops
        if params.allowed_token_ids is not None and not set(params.allowed_token_ids) - forbidden:
            raise RequestError("allowed_token_ids: bad_words and min_tokens forbid every one of them; allow another token", "allowed_token_ids")
        phrases = tuple(w for w in words if len(w) > 1)
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        if not (biases or stops or phrases) and params.allowed_token_ids is None and penalties == (1, 0, 0):  # as a rule
            return None
        return cls(
            biased=np.array([t for t, _ in biases], np.int32),
            bias=np.array([value for _, value in biases], np.float32),
            min_tokens=params.min_tokens,
            stops=np.array(sorted(stops), np.int32),
            bad_words=phrases,
            allowed=None if params.allowed_token_ids is None else np.unique(np.array(params.allowed_token_ids, np.int32)),
            penalties=None if penalties == (1, 0, 0) else penalties,
        )


class LogitEdits:
    """The rules that apply in one step: `arrays` as `FIELDS` says, in one int32 buffer that begins with their lengths."""

    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = buffer
        self.arrays: dict[str, np.ndarray] = {}
        begin = len(FIELDS)
        for (name, kind), length in zip(FIELDS.items(), buffer[: len(FIELDS)].tolist(), strict=True):
            self.arrays[name] = buffer[begin : begin + length].view(kind)
            begin += length

    @classmethod
    def pack(cls, rows: Iterable[tuple[int, Sequence, int]]) -> LogitEdits | None:
        """For (row of logits, sequence that samples there, tokens it has generated): what its rules say; None when they say nothing now."""
        parts: dict[str, list[np.ndarray]] = {name: [] for name in FIELDS}
        for row, seq, num_output in rows:
            if seq.rules is not None:
                _apply(seq.rules, row, seq, num_output, parts)
        arrays = [np.concatenate([np.empty(0, kind), *parts[name]]).astype(kind) for name, kind in FIELDS.items()]
        if not any(map(len, arrays)):
            return None
        return cls(np.concatenate([np.array([len(a) for a in arrays], np.int32), *(a.view(np.int32) for a in arrays)]))


def _apply(rules: LogitRules, row: int, seq: Sequence, num_output: int, parts: Mapping[str, list[np.ndarray]]) -> None:
    def edit(conditions: int | np.ndarray, tokens: np.ndarray, values: float | np.ndarray) -> None:
        for name, value in (("edit_rows", row), ("edit_conditions", conditions), ("edit_values", values)):
            parts[name].append(np.broadcast_to(np.asarray(value, FIELDS[name]), len(tokens)))
        parts["edit_tokens"].append(tokens)

    if len(rules.biased):
        edit(-1, rules.biased, rules.bias)
    if num_output < rules.min_tokens and len(rules.stops):
        edit(-1, rules.stops, -np.inf)
    if rules.bad_words:
        length = seq.num_prompt + num_output
        completed = [w for w in rules.bad_words if len(w) <= length + 1 and tuple(seq.token_ids[length - len(w) + 1 : length - 1]) == w[:-2]]
        if completed:
            edit(np.array([w[-2] for w in completed], np.int32), np.array([w[-1] for w in completed], np.int32), -np.inf)
    if rules.allowed is not None:
        index = len(parts["restricted_rows"])
        parts["restricted_rows"].append(np.array([row], np.int32))
        parts["allowed_in"].append(np.full(len(rules.allowed), index, np.int32))
        parts["allowed_tokens"].append(rules.allowed)
    if rules.penalties is not None:
        values = (row, seq.row, *rules.penalties)
        for name, value in zip(("penalty_rows", "penalty_lines", "repetition", "presence", "frequency"), values, strict=True):
            parts[name].append(np.array([value], FIELDS[name]))
        if not seq.counted:
            seq.counted = True
            parts["new_lines"].append(np.array([seq.row], np.int32))
            prompt = np.unique(np.array(seq.token_ids[: seq.num_prompt], np.int32))
            output, counts = np.unique(np.array(seq.token_ids[seq.num_prompt :], np.int32), return_counts=True)
            for name, part in (("seen_tokens", (prompt, output)), ("seen_counts", (np.full(len(prompt), IN_PROMPT), counts))):
                parts[name].extend(part)
            parts["seen_lines"].append(np.full(len(prompt) + len(output), seq.row, np.int32))
