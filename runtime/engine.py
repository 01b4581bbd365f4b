"""The engine: requests in, deltas out. While one step runs, the next one is scheduled and launched."""

from __future__ import annotations

import secrets
import struct
from array import array
from collections import deque
from dataclasses import dataclass
from itertools import count
from numbers import Integral

import msgspec
import numpy as np

from ingot.artifacts.manifest import ModelInfo
from ingot.ops.errors import IngotError

from .batch import Sampled, pack, size_of
from .beam_search import BeamSearch
from .beams import Answer, Beams
from .detokenizer import Detokenizer, KnownTexts
from .kv_cache import KVCache
from .logit_rules import NONE_LEFT, NOT_FINITE, LogitRules
from .protocol import Executor, InFlight
from .ranking import Ranking
from .records import sampling_record
from .request import Delta, Deltas, FinishReason, Request, RequestError, SamplingParams, Sequence, Status, TokenLogprob, Usage
from .scheduler import Scheduler, Step
from .tokenizer import Tokenizer

_WHY_NO_TOKEN = {
    NOT_FINITE: "the model's logits are not finite: its weights or kernels are damaged",
    NONE_LEFT: "no token is left to choose: bad_words and allowed_token_ids forbid every one",
}
_SEED_STRIDE = 0x9E3779B97F4A7C15  # between the continuations of a request


def _int32(tokens: list[int]) -> array[int] | None:
    """None if one is no int32."""
    try:
        return array("i", struct.pack(f"{len(tokens)}i", *tokens))  # half the time of array("i", tokens)
    except struct.error:
        return None


@dataclass(frozen=True)
class EngineOptions:
    """How to run an artifact on this machine. None: what the artifact was compiled for, or as much as fits."""

    max_model_len: int | None = None  # tokens of a sequence
    gpu_memory_utilization: float = 0.9  # fraction of the device's memory that may be used
    num_pages: int | None = None  # of each page group
    enable_prefix_caching: bool = True
    max_num_batched_tokens: int | None = None  # tokens of a step
    num_threads: int | None = None  # of the CPU
    overlap: bool = True  # schedule a step while the one before runs, where the device allows it


class EngineStats(msgspec.Struct, frozen=True):
    """Counts since the start, except `running`, `waiting` (sequences) and `pages` (used and total, by group)."""

    running: int
    waiting: int
    pages: dict[str, tuple[int, int]]
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
    prefix_caching_off: str  # why; "" when it is on


class Engine:
    """Schedules requests over an executor. Not thread-safe: one thread adds, aborts and steps.

    Without a tokenizer there is no text: deltas carry token ids only and stop strings are refused.
    """

    def __init__(self, executor: Executor, tokenizer: Tokenizer | None, model_info: ModelInfo, *, enable_prefix_caching: bool = True,
                 max_num_batched_tokens: int | None = None, overlap: bool = True) -> None:  # fmt: skip
        info = executor.info
        budget = info.max_num_batched_tokens if max_num_batched_tokens is None else max_num_batched_tokens
        if not 1 <= budget <= info.max_num_batched_tokens:
            raise RequestError(f"max_num_batched_tokens is {budget}; the artifact serves steps of 1 to {info.max_num_batched_tokens} tokens")
        self.executor, self.tokenizer, self.model_info, self.info = executor, tokenizer, model_info, info
        self.cache = KVCache(info.groups, info.max_num_seqs, info.max_model_len, enable_prefix_caching, max_num_new=budget)
        self.max_model_len = min(info.max_model_len, self.cache.capacity)
        self.scheduler = Scheduler(self.cache, max_num_seqs=self.cache.num_rows, max_num_batched_tokens=budget, max_num_rows=info.max_num_rows)
        self._depth = 2 if info.asynchronous and overlap else 1  # steps in flight when one is collected
        self._in_flight: deque[tuple[Step, InFlight]] = deque()
        self._eos = frozenset(model_info.eos_token_ids)
        self._texts = KnownTexts(tokenizer, info.vocab_size)
        self._requests: dict[str, list[Sequence]] = {}  # unfinished sequences
        self._siblings: dict[Sequence, list[Sequence]] = {}  # who waits for the prompt that this one computes
        self._rankings: dict[str, Ranking] = {}  # of requests whose answers are chosen at their end
        self._ended: list[Delta] = []  # of requests that ended between steps
        self._numbers = count()
        self._prompt_tokens = self._generated_tokens = 0

    @property
    def vocab_size(self) -> int:
        return self.info.vocab_size

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to say."""
        return bool(self._requests or self._ended or self._in_flight)

    def has(self, request_id: str) -> bool:
        """Whether a request has not ended."""
        return request_id in self._requests

    def add(self, request: Request) -> None:
        """Queue a request. RequestError when it cannot be served; nothing else is affected then."""
        params, prompt = request.params, self._checked(request)
        max_tokens = self.max_model_len - len(prompt) if params.max_tokens is None else params.max_tokens
        words = [ids for word in params.bad_words for ids in self._tokenizer_for("bad_words").spellings(word)]
        rules = LogitRules.of(params, self._eos, words, self.info.vocab_size)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        number = next(self._numbers)
        stop_ids = (frozenset() if params.ignore_eos else self._eos).union(params.stop_token_ids)
        beams = None
        if params.beam_width is not None:
            beams = Beams(request, BeamSearch(params.beam_width, max_tokens, stop_ids, params.length_penalty, params.early_stopping))
            params = SamplingParams(temperature=0, logprobs=min(max(beams.search.num_candidates, params.logprobs or 0), self.info.vocab_size))
        sequences = [
            Sequence(
                request=request,
                index=i,
                order=(request.priority, request.arrival, number, i),
                max_tokens=max_tokens,
                known=prompt[:],
                sampling=sampling_record(params, (seed + i * _SEED_STRIDE) % 2**64),
                stop_ids=stop_ids,
                rules=rules,
                beams=beams,
                detokenizer=self._detokenizer(params),
            )
            for i in range(params.num_sequences)
        ]
        # With prefix caching the others wait until they can share the first one's pages.
        together = 1 if not self.cache.prefix_caching_off else len(sequences)
        for seq in sequences[:together]:
            self.scheduler.add(seq)
        if sequences[together:]:
            self._siblings[sequences[0]] = sequences[together:]
        self._requests[request.id] = sequences
        self._texts.stop_at(stop_ids)
        if beams is not None:
            beams.begin(sequences[0])
        if params.ranked:
            self._rankings[request.id] = Ranking(params.n, params.num_sequences)

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        return None if self.tokenizer is None else Detokenizer(self.tokenizer, params.stop, params.min_tokens)

    def _checked(self, request: Request) -> array[int]:
        """The prompt's tokens. RequestError when the request cannot be served."""
        params, vocab_size = request.params, self.info.vocab_size
        where = f"request {request.id}"
        if request.id in self._requests:
            raise RequestError(f"{where}: the id is in use; give every request its own")
        if not request.prompt_token_ids:
            raise RequestError(f"{where}: the prompt is empty; it needs at least one token")
        prompt = _int32(request.prompt_token_ids)
        if prompt is None or (ids := np.frombuffer(prompt, np.int32)).min() < 0 or ids.max() >= vocab_size:
            wrong = next(t for t in request.prompt_token_ids if not isinstance(t, Integral) or not 0 <= t < vocab_size)
            raise RequestError(f"{where}: prompt token {wrong} is not in the vocabulary of {vocab_size}")
        total = len(prompt) + (params.max_tokens or 1)
        if total > self.info.max_model_len:
            raise RequestError(
                f"{where}: {len(prompt)} prompt tokens and max_tokens {params.max_tokens} make {total}, and the model serves {self.info.max_model_len}; "
                "lower max_tokens or shorten the prompt"
            )
        if params.max_tokens is None and len(prompt) >= self.max_model_len:
            raise RequestError(f"{where}: {len(prompt)} prompt tokens fill the whole KV cache of {self.max_model_len}; give it more memory")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocab_size:
                raise RequestError(f"{where}: {name} is {getattr(params, name)}; the vocabulary has {vocab_size} tokens")
        if params.stop:
            self._tokenizer_for("stop")
        if (params.beam_width or 0) > vocab_size:
            raise RequestError(f"{where}: beam_width is {params.beam_width}; the vocabulary has {vocab_size} tokens", "beam_width")
        return prompt

    def _tokenizer_for(self, field: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{field} strings need a tokenizer, and the artifact has none; use token ids", field)
        return self.tokenizer

    def abort(self, request_id: str) -> None:
        """End a request and free its pages now; its last deltas come with the next step. An unknown or finished id is ignored."""
        for seq in list(self._requests.get(request_id, ())):
            self._ended += self._end(seq, "abort")

    def step(self) -> Deltas:
        """Keep the device busy, and wait for the oldest step; what it added to each sequence, at most one delta a sequence."""
        while len(self._in_flight) < self._depth and self._launch():
            pass
        deltas = self._collect() if self._in_flight else Deltas()
        deltas.others[:0], self._ended = self._ended, []
        if self._rankings:
            deltas.others = [answer for delta in deltas.others for answer in self._answers(delta)]
        return deltas

    def _answers(self, delta: Delta) -> list[Delta]:
        ranking = self._rankings.get(delta.request_id)
        if ranking is None:
            return [delta]
        answers = ranking.add(delta)
        if answers:
            del self._rankings[delta.request_id]
        return answers

    def _launch(self) -> bool:
        """Schedule a step and send it off; False when there is none to send."""
        step = self.scheduler.schedule()
        if step is None:
            return False
        try:
            batch = self.executor.batch(size_of(step))
            pack(step, self.cache, batch)
            self._in_flight.append((step, self.executor.launch(batch)))
        except IngotError as e:  # nothing of this step can be trusted; whoever waits can still be served
            self._ended += self._fail(step, e)
            return False
        self.scheduler.launched(step)
        return True

    def _collect(self) -> Deltas:
        """Wait for the oldest step in flight. Sequences that ended since it was launched have no use for what it says."""
        step, flight = self._in_flight.popleft()
        try:
            sampled = flight.result()
        except IngotError as e:  # nor can later steps be trusted, which may have read what this one wrote, or anything found in the cache
            failed = [delta for each in (step, *(s for s, _ in self._in_flight)) for delta in self._fail(each, e)]
            self.cache.forget_prefixes()
            self.scheduler.collected()
            return Deltas(failed)
        self.scheduler.collected()
        return self._deltas(step, sampled)

    def _fail(self, step: Step, error: IngotError) -> list[Delta]:
        return [delta for seq in step.sequences if seq.status is not Status.FINISHED for delta in self._end(seq, "error", str(error))]

    def _deltas(self, step: Step, sampled: Sampled) -> Deltas:
        logprobs, top_ids, top_logprobs = ([] if a is None else a.tolist() for a in sampled[1:])

        def logprob(row: int, wanted: int) -> TokenLogprob:
            top = tuple(zip(top_ids[row][:wanted], top_logprobs[row][:wanted], strict=True)) if wanted else ()
            return TokenLogprob(int(sampled.token_ids[row]), logprobs[row], top)

        sampling = step.sequences if step.num_sampled == len(step.sequences) else [step.sequences[i] for i in np.flatnonzero(step.samples).tolist()]
        row = len(sampling)
        for seq, positions in step.prompt_rows:
            for _ in positions:
                seq.add_prompt_logprob(logprob(row, seq.request.params.prompt_logprobs or 0))
                row += 1
        state, rows, new = self.scheduler.rows, step.sampled(step.rows), sampled.token_ids[: len(sampling)]
        num_tokens = step.sampled(step.num_tokens)
        flows = state.flowing.take(rows) & self._texts.known.take(new) & step.sampled(step.num_tokens < step.end)
        deltas = self._flow(rows[flows], num_tokens[flows], new[flows])
        others = (~flows).nonzero()[0]
        for row, token, num_known in zip(others.tolist(), new[others].tolist(), num_tokens[others].tolist(), strict=True):
            seq = sampling[row]
            if seq.status is Status.FINISHED:
                continue
            if token < 0:
                deltas.others += self._end(seq, "error", _WHY_NO_TOKEN[token])
            elif seq.beams is not None:
                deltas.others += self._report(seq, list(zip(top_ids[row], top_logprobs[row], strict=True)))
            else:
                wanted = seq.request.params.logprobs
                if seq.request.params.ranked:
                    seq.score += logprobs[row]
                deltas.others.append(self._append(seq, num_known, token, None if wanted is None else [logprob(row, wanted)]))
        return deltas

    def _flow(self, rows: np.ndarray, num_tokens: np.ndarray, new: np.ndarray) -> Deltas:
        """One more token of each row, which has so many, and nothing follows from it."""
        state, texts = self.scheduler.rows, self._texts.texts
        state.append(rows, num_tokens, new)
        self._generated_tokens += len(new)
        return Deltas([], state.request_ids.take(rows).tolist(), state.index.take(rows).tolist(), new.tolist(), texts.take(new).tolist())

    def _append(self, seq: Sequence, num_known: int, token: int, logprobs: list[TokenLogprob] | None) -> Delta:
        """One more token of `seq` after the `num_known` it has, and what follows from it."""
        detokenizer, request = seq.detokenizer, seq.request
        seq.append(num_known, token)
        count = num_known + 1 - seq.num_prompt
        self._generated_tokens += 1
        stops = token in seq.stop_ids
        text = "" if stops or detokenizer is None else detokenizer.feed(token)
        if seq.plain:
            self._texts.learn(token)
            if seq.rows is not None:
                seq.rows.flowing[seq.row] = detokenizer is None or detokenizer.is_whole
        if 1 < count < seq.max_tokens and not stops and (detokenizer is None or detokenizer.stopped is None):
            return Delta(request.id, seq.index, [token], text, logprobs)
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if stops:
            reason, stop_reason = "stop", token if token in request.params.stop_token_ids else None
        elif detokenizer is not None and detokenizer.stopped is not None:
            reason, stop_reason = "stop", detokenizer.stopped
        elif count == seq.max_tokens:
            reason = "length"
        prompt_logprobs = None
        if count == 1:
            self._start_siblings(seq)
            if seq.index == 0:
                self._prompt_tokens += seq.num_prompt
                prompt_logprobs = seq.prompt_logprobs or None
        if reason is not None:
            text += self._free(seq)
        score = seq.score if reason is not None and request.params.ranked else None
        return Delta(request.id, seq.index, [token], text, logprobs, prompt_logprobs, reason, stop_reason, seq.usage(), score)

    def _report(self, seq: Sequence, candidates: list[tuple[int, float]]) -> list[Delta]:
        """What the model says after a beam; the answers when that ends the search."""
        beams = seq.beams
        assert beams is not None
        if len(seq.token_ids) == seq.num_prompt:
            self._prompt_tokens += seq.num_prompt
        if beams.report(seq, candidates):
            beams.advance(self.scheduler)
        if not beams.search.done:
            return []
        del self._requests[seq.request.id]
        return [self._answer(seq, i, answer) for i, answer in enumerate(beams.answers()[: seq.request.params.n])]

    def _answer(self, seq: Sequence, index: int, answer: Answer) -> Delta:
        """What beam search found for the request of `seq`."""
        tokens, params, detokenizer = list(answer.token_ids), seq.request.params, self._detokenizer(seq.request.params)
        self._generated_tokens += len(tokens)
        stopped = tokens[-1] in seq.stop_ids
        text = "" if detokenizer is None else "".join(map(detokenizer.feed, tokens[: len(tokens) - stopped])) + detokenizer.finish()
        stop_reason = tokens[-1] if stopped and tokens[-1] in params.stop_token_ids else None
        usage = Usage(seq.num_prompt, max(seq.num_cached, 0), len(tokens))
        logprobs = None if params.logprobs is None else list(answer.logprobs)
        return Delta(seq.request.id, index, tokens, text, logprobs, None, "stop" if stopped else "length", stop_reason, usage, answer.score)

    def _end(self, seq: Sequence, reason: FinishReason, stop_reason: str | None = None) -> list[Delta]:
        """End `seq` without another token; with a beam the whole search."""
        if seq.beams is not None:
            for beam in seq.beams.sequences:
                self.scheduler.finish(beam)
            del self._requests[seq.request.id]
            ended = Delta(seq.request.id, 0, finish_reason=reason, stop_reason=stop_reason, usage=Usage(seq.num_prompt, max(seq.num_cached, 0), 0))
            return [msgspec.structs.replace(ended, index=i) for i in range(seq.request.params.n)]
        text = self._free(seq)
        return [Delta(seq.request.id, seq.index, text=text, finish_reason=reason, stop_reason=stop_reason, usage=seq.usage())]

    def _free(self, seq: Sequence) -> str:
        """Take `seq` out, and free what it holds; the text that was held back."""
        self._start_siblings(seq)
        self.scheduler.finish(seq)
        alive = self._requests[seq.request.id]
        alive.remove(seq)
        if not alive:
            del self._requests[seq.request.id]
        return "" if seq.detokenizer is None else seq.detokenizer.finish()

    def _start_siblings(self, seq: Sequence) -> None:
        """Those that waited for the prompt of `seq` find it in the prefix cache, or compute it themselves if `seq` came to nothing."""
        for sibling in self._siblings.pop(seq, ()):
            self.scheduler.add(sibling)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting + sum(map(len, self._siblings.values())),
            pages={name: (pool.num_used, len(pool.refs)) for name, pool in self.cache.pools.items()},
            prefix_query_tokens=self.cache.prefix_queries,
            prefix_hit_tokens=self.cache.prefix_hits,
            preemptions=self.scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_caching_off=self.cache.prefix_caching_off,
        )
