"""What is asked of the engine and what it answers: requests, their sequences, deltas. No torch.

Everything that crosses to another process is a `msgspec.Struct`; `Sequence` never leaves the engine.
"""

from __future__ import annotations

import enum
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ingot.ops.errors import IngotError

if TYPE_CHECKING:
    from .beams import Beams
    from .detokenizer import Detokenizer
    from .logit_rules import LogitRules
    from .rows import Rows

FinishReason = Literal["stop", "length", "abort", "error"]
GREEDY_TEMPERATURE = 1e-5
"""Below it a temperature means greedy: dividing by it would overflow, and the result would be the same."""


class RequestError(IngotError):
    """A request that cannot be served as it stands; the message names the field and what it may be. `field`: of `SamplingParams`, if it is one of them."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("n", lambda v: _is_count(v, 1), "an integer ≥ 1"),
    ("max_tokens", lambda v: v is None or _is_count(v, 1), "an integer ≥ 1, or None for as many as fit"),
    ("temperature", lambda v: _is_number(v) and 0 <= v < float("inf"), "a number ≥ 0"),
    ("top_k", lambda v: _is_count(v, -1), "an integer ≥ 1, or 0 or −1 for no limit"),
    ("top_p", lambda v: _is_number(v) and 0 < v <= 1, "a number in (0, 1]"),
    ("min_p", lambda v: _is_number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    ("seed", lambda v: v is None or (_is_count(v, -(2**63)) and v < 2**64), "an integer of 64 bits, or None"),
    ("stop", lambda v: all(isinstance(s, str) and s for s in v), "strings that are not empty"),
    ("stop_token_ids", lambda v: all(_is_count(t, 0) for t in v), "token ids ≥ 0"),
    ("logprobs", lambda v: v is None or _is_count(v, 0), "an integer ≥ 0, or None"),
    ("prompt_logprobs", lambda v: v is None or _is_count(v, 0), "an integer ≥ 0, or None"),
    ("repetition_penalty", lambda v: _is_number(v) and 0 < v < float("inf"), "a number > 0"),
    ("presence_penalty", lambda v: _is_number(v) and -2 <= v <= 2, "a number in [−2, 2]"),
    ("frequency_penalty", lambda v: _is_number(v) and -2 <= v <= 2, "a number in [−2, 2]"),
    ("logit_bias", lambda v: all(_is_count(t, 0) and _is_number(b) and -100 <= b <= 100 for t, b in v.items()), "token ids with numbers in [−100, 100]"),
    ("min_tokens", lambda v: _is_count(v, 0), "an integer ≥ 0"),
    ("bad_words", lambda v: all(isinstance(w, str) and w.strip() for w in v), "words that are not empty"),
    ("allowed_token_ids", lambda v: v is None or (v and all(_is_count(t, 0) for t in v)), "token ids ≥ 0, at least one, or None for all"),
    ("best_of", lambda v: v is None or _is_count(v, 1), "an integer ≥ 1, or None for n"),
    ("beam_width", lambda v: v is None or _is_count(v, 1), "an integer ≥ 1, or None for no beam search"),
    ("length_penalty", lambda v: _is_number(v) and abs(v) < float("inf"), "a number"),
    ("early_stopping", lambda v: isinstance(v, bool) or v == "never", 'True, False or "never"'),
)
_NOT_IN_BEAMS = (
    "best_of top_k top_p min_p seed stop min_tokens repetition_penalty presence_penalty frequency_penalty logit_bias bad_words allowed_token_ids "
    "prompt_logprobs"
).split()


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How to continue a prompt. RequestError when a field is out of its range.

    The model's logits are first biased, penalized and restricted (`logits.py`), then divided by the temperature. Filters apply in
    the order top-k, top-p (on what top-k left, renormalized), min-p. Log-probabilities are natural, of the model's own
    distribution, before all of these.
    """

    n: int = 1  # independent continuations
    best_of: int | None = None  # continuations generated, of which the n with the largest sums of log-probabilities are answered
    max_tokens: int | None = 16  # None: as many as the model's length and the KV cache hold
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0 or −1: off
    top_p: float = 1.0
    min_p: float = 0.0  # keeps tokens with at least this fraction of the most probable one's probability
    seed: int | None = None  # the same seed gives the same tokens, whatever else runs
    stop: tuple[str, ...] = ()  # the text ends before the first of them
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # until then no end-of-sequence or stop token can come, and no stop string is looked for
    repetition_penalty: float = 1.0  # divides positive logits of tokens in the prompt or the output, and multiplies negative ones
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the output,
    frequency_penalty: float = 0.0  # and this once for every occurrence
    logit_bias: dict[int, float] = {}  # added to the logits of these tokens
    bad_words: tuple[str, ...] = ()  # never completed, at the beginning of the text or after a space; prompt and output are looked at
    allowed_token_ids: tuple[int, ...] | None = None  # all others are forbidden
    beam_width: int | None = None  # search the n most probable continuations with so many beams; nothing is drawn, and no filter or rule applies
    length_penalty: float = 1.0  # of beam search: answers compete with their log-probability divided by length ** length_penalty
    early_stopping: bool | Literal["never"] = False  # of beam search: `beam_search.BeamSearch`
    logprobs: int | None = None  # 0: of the chosen token; n: also of the n most probable ones
    prompt_logprobs: int | None = None  # the same for every prompt token but the first

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            if getattr(self, name) is not None:
                msgspec.structs.force_setattr(self, name, tuple(getattr(self, name)))
        for name, holds, wanted in _RULES:
            value = getattr(self, name)
            if not holds(value):
                raise RequestError(f"{name} is {value!r}; it must be {wanted}", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}", "min_tokens")
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of is {self.best_of}; it must be at least n, {self.n}", "best_of")
        if self.beam_width is not None:
            self._check_beams(self.beam_width)

    def _check_beams(self, width: int) -> None:
        if width < self.n:
            raise RequestError(f"beam_width is {width}; it must be at least n, {self.n}", "beam_width")
        default = SamplingParams()
        for name in _NOT_IN_BEAMS:
            if getattr(self, name) != getattr(default, name):
                raise RequestError(f"{name} is {getattr(self, name)!r}; beam search has no use for it: leave it out", name)
        if self.temperature not in (0, 1):
            raise RequestError(f"temperature is {self.temperature}; beam search compares the model's own probabilities: leave it out", "temperature")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def num_sequences(self) -> int:
        """Continuations that are generated for `n` answers."""
        return self.best_of or self.n

    @property
    def ranked(self) -> bool:
        """Whether continuations are compared, by their log-probabilities."""
        return self.num_sequences > self.n


class Request(msgspec.Struct, frozen=True):
    """A tokenized prompt and what to do with it."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams = SamplingParams()
    priority: int = 0  # lower goes first; equals by arrival
    arrival: float = msgspec.field(default_factory=time.monotonic)  # seconds
    cache_keys: tuple[str, ...] = ()  # what else decides the KV of a token: adapter, media, salt


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """A token's natural-log probability, and the most probable (token id, log-probability) pairs, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens so far: of the prompt, those of it whose KV came from the prefix cache, generated."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class Delta(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """What one step added to continuation `index` of a request.

    `token_ids` include the end-of-sequence or stop token, `text` does not; `text` may lag behind while characters or
    stop strings are undecided. `prompt_logprobs` (None for the first token) come once, with index 0's first token; `usage` comes
    with the first token and at the end.
    """

    request_id: str
    index: int
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id; of an error, what happened
    usage: Usage | None = None
    score: float | None = None  # at the end, of `best_of` and beam search: what answers are ranked by


class Deltas(msgspec.Struct, array_like=True, gc=False):
    """What one step added to each continuation, at most one delta to each. As a rule that is a token and its text: such deltas lie in columns."""

    others: list[Delta] = []
    request_ids: list[str] = []
    indices: list[int] = []
    token_ids: list[int] = []
    texts: list[str] = []

    def __iter__(self) -> Iterator[Delta]:
        for request_id, index, token, text in self.columns():
            yield Delta(request_id, index, [token], text)
        yield from self.others

    def columns(self) -> Iterator[tuple[str, int, int, str]]:
        """Row by row."""
        return zip(self.request_ids, self.indices, self.token_ids, self.texts, strict=True)

    def take(self, rows: list[int]) -> Deltas:
        """Those in some rows of the columns."""
        ids, indices, tokens, texts = self.request_ids, self.indices, self.token_ids, self.texts
        return Deltas([], [ids[i] for i in rows], [indices[i] for i in rows], [tokens[i] for i in rows], [texts[i] for i in rows])

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + sum([len(delta.token_ids) for delta in self.others])


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"  # preempted as a beam whose next token is not chosen yet
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One continuation of a request: its known tokens, and where it stands. What a running one has computed is in `rows.Rows`."""

    request: Request
    index: int
    order: tuple[float, ...]  # who goes first; the last one is preempted first
    max_tokens: int
    known: array[int]  # `token_ids`; while it is running its row may have more of them
    sampling: bytes  # `records.sampling_record`
    stop_ids: frozenset[int] = frozenset()  # the end-of-sequence ids among them, unless they are ignored
    rules: LogitRules | None = None  # None: the model's logits are sampled as they are
    beams: Beams | None = None  # that it belongs to: its next tokens are chosen by the host
    detokenizer: Detokenizer | None = None
    status: Status = Status.WAITING
    num_cached: int = -1  # prompt tokens found in the prefix cache when first admitted; −1: not yet
    row: int = -1  # while it is running
    rows: Rows | None = None  # that this is one of
    last_step: int = -1  # that was launched with it before it was preempted
    score: float = 0.0  # sum of the log-probabilities of its output, if it is to be ranked
    counted: bool = False  # since it has its row: the device counts its tokens, for penalties
    page_hashes: dict[int, list[bytes]] = field(default_factory=dict)  # by page size
    id: str = field(init=False)  # the request's
    num_prompt: int = field(init=False)
    last: int = field(init=False)  # tokens that it has when one more is its last
    prompt_logprobs: list[TokenLogprob | None] = field(init=False)  # so far; continuation 0 computes them for all
    wants_prompt_logprobs: bool = field(init=False)  # some are still to be computed
    plain: bool = field(init=False)  # of what a step samples for it only the token counts, and no text ends it

    def __post_init__(self) -> None:
        params = self.request.params
        self.plain = self.beams is None and params.logprobs is None and not params.ranked and not params.stop
        self.id, self.num_prompt = self.request.id, len(self.request.prompt_token_ids)
        self.last = self.num_prompt + self.max_tokens - 1
        scores = self.index == 0 and self.request.params.prompt_logprobs is not None
        self.prompt_logprobs = [None] if scores else []
        self.wants_prompt_logprobs = scores and self.num_prompt > 1

    @property
    def token_ids(self) -> array[int]:
        """Prompt and output as far as they are known, int32."""
        if self.rows is not None:
            self.rows.settle(self)
        return self.known

    def append(self, num_known: int, token: int) -> None:
        """One more of `token_ids`, of which there are `num_known`."""
        if self.rows is None:
            self.known.append(token)
        else:
            self.rows.append(self.row, num_known, token)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    def prompt_rows(self, num_computed: int, num_new: int) -> range:
        """Positions among the `num_new` after `num_computed` whose logits give the next prompt token a log-probability that is wanted."""
        if not self.wants_prompt_logprobs:
            return range(0)
        # prompt_logprobs[i] comes from the logits of position i − 1; entry 0 is None.
        return range(max(num_computed, len(self.prompt_logprobs) - 1), min(num_computed + num_new, self.num_prompt - 1))

    def add_prompt_logprob(self, entry: TokenLogprob) -> None:
        self.prompt_logprobs.append(entry)
        self.wants_prompt_logprobs = len(self.prompt_logprobs) < self.num_prompt

    def usage(self) -> Usage:
        return Usage(self.num_prompt, max(self.num_cached, 0), self.num_output)
