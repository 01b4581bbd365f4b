"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ingot.runtime.request import Delta, SamplingParams, TokenLogprob

from ..protocol.completion import Choice, Completion, CompletionRequest
from ..protocol.errors import ApiError
from ..service import Service
from .exchange import HOLE, Event, TextEvents, answer, check, read, stream, until_disconnect
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
        return await stream(request, job.events())
    return answer(await until_disconnect(request, job.whole()))


async def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        prompt = [prompt]  # type: ignore[assignment]
    return [await service.encode(p) if isinstance(p, str) else p for p in prompt]  # type: ignore[misc]


class _Job:
    """One request to be answered, in pieces or as a whole."""

    def __init__(self, service: Service, body: CompletionRequest, prompts: list[list[int]]) -> None:
        self._service, self._body, self._prompts = service, body, prompts
        self._params = self._sampling()
        self._tally = Tally(prompts, self._params.n)
        self._begun: dict[int, int] = {}  # characters so far, by choice
        self._head: dict[str, Any] = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model.name}

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
        """All pieces put together."""
        choices: dict[int, Choice] = {}
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                if piece.index in choices:
                    choices[piece.index].extend(piece)
                else:
                    choices[piece.index] = piece
        return Completion(**self._head, choices=[choices[i] for i in sorted(choices)], usage=self._tally.usage())

    async def events(self) -> AsyncGenerator[Event, None]:
        """A response for each piece, and one for the usage when it is asked for."""
        plain: dict[int, TextEvents] = {}
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                if piece.finish_reason is not None or piece.logprobs is not None or piece.token_ids is not None:
                    yield Completion(**self._head, choices=[piece])
                    continue
                if piece.index not in plain:
                    plain[piece.index] = TextEvents(Completion(**self._head, choices=[Choice(index=piece.index, text=HOLE)]))
                yield plain[piece.index].json(piece.text)
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield Completion(**self._head, choices=[], usage=self._tally.usage())

    async def _pieces(self) -> AsyncGenerator[Choice, None]:
        async with self._service.generate(self._prompts, self._params, self._body.priority) as generation:
            async for arrived in generation.arrivals():
                for index, delta in arrived:
                    self._tally.add(index, delta)
                    piece = self._piece(index, delta)
                    if piece is not None:
                        yield piece

    def _piece(self, index: int, delta: Delta) -> Choice | None:
        body, text, token_ids = self._body, delta.text, delta.token_ids
        logprobs: Sequence[TokenLogprob | None] = delta.logprobs or []
        if body.max_tokens == 0:
            text, token_ids, logprobs = "", [], []
        if body.echo and index not in self._begun:
            prompt = self._prompts[index // self._params.n]
            text, token_ids, logprobs = self._service.decode(prompt) + text, prompt + token_ids, [*(delta.prompt_logprobs or []), *logprobs]
        offset = self._begun.get(index, 0)
        self._begun[index] = offset + len(text)
        shows_tokens = body.return_token_ids or body.logprobs is not None
        if not (text or delta.finish_reason or (shows_tokens and token_ids)):
            return None  # its characters are not complete yet
        return Choice(
            index=index,
            text=text,
            logprobs=None if body.logprobs is None else completion_logprobs(self._service, token_ids, logprobs, offset),
            finish_reason=check(delta),
            token_ids=token_ids if body.return_token_ids else None,
        )
