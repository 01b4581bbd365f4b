"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ingot.runtime.request import Delta

from ..protocol.chat import ChatChoice, ChatChunk, ChatCompletion, ChatDelta, ChatMessage, ChatRequest
from ..protocol.errors import ApiError
from ..protocol.usage import Usage
from ..service import Service
from .exchange import EventStream, answer, check, read, until_disconnect
from .job import Job
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
        return EventStream(job)
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


class _Job(Job[ChatDelta]):
    def __init__(self, service: Service, body: ChatRequest, prompt: list[int]) -> None:
        self._service = service
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        max_tokens = service.fit([prompt], wanted, explicit=True)
        params = body.params(max_tokens=max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        self._begun: set[int] = set()
        self._head: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model.name}
        super().__init__(
            service.generate([prompt], params, body.priority), Tally([prompt], params.n), with_usage=body.includes_usage, text_only=not body.logprobs
        )

    async def whole(self) -> ChatCompletion:
        """The answer at once."""
        choices = [ChatChoice(index=c.index, message=c.delta, logprobs=c.logprobs, finish_reason=c.finish_reason) for c in await self.choices()]
        return ChatCompletion(**self._head, choices=choices, usage=self._tally.usage())

    def chunk(self, pieces: list[ChatDelta], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(**self._head, choices=pieces, usage=usage)

    def text_piece(self, choice: int, text: str) -> ChatDelta:
        return ChatDelta(index=choice, delta=ChatMessage(content=text))

    def piece(self, choice: int, delta: Delta) -> ChatDelta | None:
        if choice in self._begun and not (delta.text or delta.finish_reason or delta.logprobs):
            return None
        message = ChatMessage(role=None if choice in self._begun else "assistant", content=delta.text)
        self._begun.add(choice)
        logprobs = None if delta.logprobs is None else chat_logprobs(self._service, delta.logprobs)
        return ChatDelta(index=choice, delta=message, logprobs=logprobs, finish_reason=check(delta))
