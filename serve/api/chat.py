"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..protocol.chat import ChatChoice, ChatChunk, ChatCompletion, ChatDelta, ChatMessage, ChatRequest
from ..protocol.errors import ApiError
from ..service import Service
from .exchange import HOLE, Event, TextEvents, answer, check, read, stream, until_disconnect
from .logprobs import chat_logprobs
from .tally import Tally

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    service.engine()
    service.check_generates()
    body = await read(request, ChatRequest)
    service.check_model(body.model)
    job = _Job(service, body, await _prompt(service, body))
    if body.stream:
        return await stream(request, job.events())
    return answer(await until_disconnect(request, job.whole()))


async def _prompt(service: Service, body: ChatRequest) -> list[int]:
    if service.tokenizer is None:
        raise ApiError(400, "the artifact has no tokenizer: use /v1/completions with token ids", param="messages", code="no_tokenizer")
    variables = body.chat_template_kwargs or {}
    taken = sorted({"self", "messages", "tools", "add_generation_prompt"} & set(variables))
    if taken:
        raise ApiError(400, f"{', '.join(taken)} cannot be set here", param="chat_template_kwargs", code="invalid_value")
    messages = [m.for_template for m in body.messages]
    text = service.tokenizer.apply_chat_template(messages, add_generation_prompt=body.add_generation_prompt, **variables)
    return await service.encode(text, add_special_tokens=False)


class _Job:
    """One request to be answered, in pieces or as a whole."""

    def __init__(self, service: Service, body: ChatRequest, prompt: list[int]) -> None:
        self._service, self._body, self._prompts = service, body, [prompt]
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        max_tokens = service.fit(self._prompts, wanted, explicit=True)
        self._params = body.params(max_tokens=max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        self._tally = Tally(self._prompts, self._params.n)
        self._head: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model.name}

    async def whole(self) -> ChatCompletion:
        """All pieces put together."""
        choices: dict[int, ChatDelta] = {}
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                if piece.index in choices:
                    choices[piece.index].extend(piece)
                else:
                    choices[piece.index] = piece
        finished = [ChatChoice(index=c.index, message=c.delta, logprobs=c.logprobs, finish_reason=c.finish_reason) for _, c in sorted(choices.items())]
        return ChatCompletion(**self._head, choices=finished, usage=self._tally.usage())

    async def events(self) -> AsyncGenerator[Event, None]:
        """A chunk for each piece, and one for the usage when it is asked for."""
        plain: dict[int, TextEvents] = {}
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                if piece.finish_reason is not None or piece.logprobs is not None or piece.delta.role is not None:
                    yield ChatChunk(**self._head, choices=[piece])
                    continue
                if piece.index not in plain:
                    hole = ChatDelta(index=piece.index, delta=ChatMessage(content=HOLE))
                    plain[piece.index] = TextEvents(ChatChunk(**self._head, choices=[hole]))
                yield plain[piece.index].json(piece.delta.content or "")
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield ChatChunk(**self._head, choices=[], usage=self._tally.usage())

    async def _pieces(self) -> AsyncGenerator[ChatDelta, None]:
        begun: set[int] = set()
        async with self._service.generate(self._prompts, self._params, self._body.priority) as generation:
            async for arrived in generation.arrivals():
                for index, delta in arrived:
                    self._tally.add(index, delta)
                    if index in begun and not (delta.text or delta.finish_reason or delta.logprobs):
                        continue  # its characters are not complete yet
                    message = ChatMessage(role=None if index in begun else "assistant", content=delta.text)
                    begun.add(index)
                    logprobs = None if delta.logprobs is None else chat_logprobs(self._service, delta.logprobs)
                    yield ChatDelta(index=index, delta=message, logprobs=logprobs, finish_reason=check(delta))
