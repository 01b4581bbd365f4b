"""`LLM`: prompts in, completions out, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TypeAlias

from .engine import Engine, EngineOptions
from .request import Delta, FinishReason, Request, RequestError, SamplingParams, TokenLogprob

Prompt: TypeAlias = str | list[int]


@dataclass
class Completion:
    """One continuation. `token_ids` include the end-of-sequence or stop token, `text` does not."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    score: float | None = None  # with `best_of` and beam search: what answers are ranked by


@dataclass
class Timing:
    """Seconds since the request was queued: to its first token, and to its end."""

    first_token: float = 0.0
    total: float = 0.0


@dataclass
class RequestOutput:
    """A prompt and its `n` continuations. `prompt_logprobs[i]` is of prompt token i given those before it; None for the first."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0
    timing: Timing = field(default_factory=Timing)

    def add(self, delta: Delta, seconds: float) -> None:
        """Take in what a step added, `seconds` after the request was queued."""
        output = self.outputs[delta.index]
        output.token_ids += delta.token_ids
        output.text += delta.text
        if delta.logprobs is not None:
            output.logprobs = output.logprobs or []
            output.logprobs += delta.logprobs
        if delta.usage is None:  # neither the first nor the last
            return
        if delta.token_ids and not self.timing.first_token:
            self.timing.first_token = seconds
            self.cached_tokens = delta.usage.cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            output.finish_reason, output.stop_reason, output.score = delta.finish_reason, delta.stop_reason, delta.score
            self.timing.total = seconds


class LLM:
    """An artifact, loaded and ready. IngotError when it cannot be: not for this machine, damaged, or too large for the memory."""

    def __init__(self, artifact_path: str | Path, *, max_model_len: int | None = None, gpu_memory_utilization: float = 0.9,
                 num_pages: int | None = None, enable_prefix_caching: bool = True, max_num_batched_tokens: int | None = None,
                 num_threads: int | None = None, overlap: bool = True) -> None:  # fmt: skip
        from .load import load_engine  # here: it imports torch, and `LLM.over` does without

        options = EngineOptions(max_model_len, gpu_memory_utilization, num_pages, enable_prefix_caching, max_num_batched_tokens, num_threads, overlap)
        self._serve(load_engine(Path(artifact_path), options))

    @classmethod
    def over(cls, engine: Engine) -> LLM:
        """An LLM over an engine that exists already."""
        llm = cls.__new__(cls)
        llm._serve(engine)
        return llm

    def _serve(self, engine: Engine) -> None:
        self.engine = engine
        self._ids = count()

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
                 priority: int | Sequence[int] = 0, progress: Callable[[int, int], None] | None = None) -> list[RequestOutput]:  # fmt: skip
        """Continue every prompt (text or token ids), in their order, batched. RequestError when one cannot be served; then none is.

        `sampling_params` and `priority` (lower goes first): one for all, or one each. `progress(finished, total)` is called whenever a request finishes.
        """
        queue = self._requests(prompts, sampling_params, priority)
        outputs = {r.id: RequestOutput(r.id, r.prompt_token_ids, [Completion(i) for i in range(r.params.n)]) for r in queue}
        begin, finished = time.perf_counter(), 0
        unfinished = {r.id: r.params.n for r in queue}
        try:
            for request in queue:
                self.engine.add(request)
            while unfinished:
                deltas = self.engine.step()
                seconds = time.perf_counter() - begin
                for request_id, index, token, text in deltas.columns():
                    if request_id in unfinished:
                        output = outputs[request_id].outputs[index]
                        output.token_ids.append(token)
                        output.text += text
                for delta in deltas.others:
                    if delta.request_id not in unfinished:
                        continue  # aborted by an earlier call
                    outputs[delta.request_id].add(delta, seconds)
                    if delta.finish_reason is None:
                        continue
                    unfinished[delta.request_id] -= 1
                    if not unfinished[delta.request_id]:
                        del unfinished[delta.request_id]
                        finished += 1
                        if progress is not None:
                            progress(finished, len(queue))
        finally:
            for request_id in unfinished:
                self.engine.abort(request_id)
        return list(outputs.values())

    def _requests(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None,
                  priority: int | Sequence[int]) -> list[Request]:  # fmt: skip
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        listed: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
        each = [params or SamplingParams()] * len(listed) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(listed):
            raise RequestError(f"sampling_params: {len(each)} for {len(listed)} prompts; give one for all or one each")
        priorities = [priority] * len(listed) if isinstance(priority, int) else list(priority)
        if len(priorities) != len(listed):
            raise RequestError(f"priority: {len(priorities)} for {len(listed)} prompts; give one for all or one each")
        return [Request(f"llm-{next(self._ids)}", self._encode(p), s, rank) for p, s, rank in zip(listed, each, priorities, strict=True)]

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.engine.tokenizer is None:
            raise RequestError("prompts: the artifact has no tokenizer; give token ids")
        return self.engine.tokenizer.encode(prompt)
