"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ingot.runtime.request import Delta, SamplingParams, TokenLogprob

from ..protocol.completion import Choice, Completion, CompletionRequest
from ..protocol.errors import ApiError
from ..protocol.usage import Usage
from ..service import Service
from .exchange import EventStream, answer, check, read, until_disconnect
from .job import Job
from .logprobs import completion_logprobs
from .tally import Tally

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    service: Service = request.app.state.service
    service.engine()
    service.check_generates()
    body = await read(request, CompletionRequest)
    service.check_model(body.model)
    job = _Job(service, body, await _prompts(service, body))
    if body.stream:
        return EventStream(job)
    return answer(await until_disconnect(request, job.whole()))


async def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        prompt = [prompt]  # type: ignore[assignment]
    return [await service.encode(p) if isinstance(p, str) else p for p in prompt]  # type: ignore[misc]


class _Job(Job[Choice]):
    def __init__(self, service: Service, body: CompletionRequest, prompts: list[list[int]]) -> None:
        self._service, self._body, self._prompts = service, body, prompts
        self._params = self._sampling()
        self._begun: dict[int, int] = {}  # characters so far, by choice
        self._head: dict[str, Any] = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model.name}
        super().__init__(
            service.generate(prompts, self._params, body.priority),
            Tally(prompts, self._params.n),
            with_usage=body.includes_usage,
            text_only=body.logprobs is None and not body.return_token_ids,
        )

    def _sampling(self) -> SamplingParams:
        body = self._body
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens must be at least 1, or 0 with echo", param="max_tokens", code="invalid_value")
        if body.echo and body.logprobs is not None and (body.n or 1) > 1:
            raise ApiError(400, "echo with logprobs needs n = 1", param="n", code="unsupported_parameter")
        # The engine generates at least one token; for max_tokens = 0 it is not shown.
        wanted = None if body.max_tokens is None else max(body.max_tokens, 1)
        max_tokens = self._service.fit(self._prompts, wanted, explicit="max_tokens" in body.model_fields_set)
        return body.params(max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None)

    async def whole(self) -> Completion:
        """The answer at once."""
        return Completion(**self._head, choices=await self.choices(), usage=self._tally.usage())

    def chunk(self, pieces: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(**self._head, choices=pieces, usage=usage)

    def text_piece(self, choice: int, text: str) -> Choice:
        return Choice(index=choice, text=text)

    def piece(self, choice: int, delta: Delta) -> Choice | None:
        body, text, token_ids = self._body, delta.text, delta.token_ids
        logprobs: Sequence[TokenLogprob | None] = delta.logprobs or []
        if body.max_tokens == 0:
            text, token_ids, logprobs = "", [], []
        if body.echo and choice not in self._begun:
            prompt = self._prompts[choice // self._params.n]
            text, token_ids, logprobs = self._service.decode(prompt) + text, prompt + token_ids, [*(delta.prompt_logprobs or []), *logprobs]
        offset = self._begun.get(choice, 0)
        self._begun[choice] = offset + len(text)
        shows_tokens = body.return_token_ids or body.logprobs is not None
        if not (text or delta.finish_reason or (shows_tokens and token_ids)):
            return None
        return Choice(
            index=choice,
            text=text,
            logprobs=None if body.logprobs is None else completion_logprobs(self._service, token_ids, logprobs, offset),
            finish_reason=check(delta),
            token_ids=token_ids if body.return_token_ids else None,
        )
