"""One HTTP exchange: reading the body, noticing that the client has gone, streaming events, telling errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Literal, TypeVar

import msgspec
import pydantic
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ingot.ops.errors import IngotError
from ingot.runtime.request import Delta, RequestError

from ..errors import EngineLost
from ..protocol.body import RequestBody
from ..protocol.errors import ApiError, from_validation

MAX_BODY_BYTES = 64 << 20
_PARAMS = {"beam_width": "use_beam_search"}
"""Fields of a request that have another name than in `SamplingParams`."""
Body = TypeVar("Body", bound=RequestBody)
T = TypeVar("T")


async def read(request: Request, body: type[Body]) -> Body:
    """The request's JSON body, checked. ApiError 400, naming the field, or 413."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
    try:
        parsed = body.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise from_validation(error) from error
    parsed.check()
    return parsed


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away before."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait((task, gone))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


Event = pydantic.BaseModel | bytes
"""An event of a stream, or its JSON."""


class TextEvents:
    """Events that differ in one string: the JSON around it is made once."""

    def __init__(self, event: pydantic.BaseModel) -> None:
        """`event`: one of them, its string `HOLE`."""
        self._before, _, self._after = event.model_dump_json().encode().partition(_HOLE_JSON)

    def json(self, text: str) -> bytes:
        return self._before + msgspec.json.encode(text) + self._after


HOLE = "\0hole"
_HOLE_JSON = msgspec.json.encode(HOLE)


async def stream(request: Request, events: AsyncGenerator[Event, None]) -> Response:
    """Server-sent events. What fails before the first event is an ordinary error response; what fails later, an event with the error."""
    first = await until_disconnect(request, anext(events))  # type: ignore[arg-type]
    return EventStream(_server_sent(first, events), media_type="text/event-stream")


async def _server_sent(first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield _event(first)
        async for event in events:
            yield _event(event)
    except (ApiError, IngotError) as error:
        yield b"data: " + JSONResponse(as_api_error(error).body).body + b"\n\n"
    finally:
        await events.aclose()
    yield b"data: [DONE]\n\n"


def _event(event: Event) -> bytes:
    return b"data: " + (event if isinstance(event, bytes) else event.model_dump_json().encode()) + b"\n\n"


def answer(response: pydantic.BaseModel) -> Response:
    """A whole answer as JSON."""
    return Response(response.model_dump_json(), media_type="application/json")


def check(delta: Delta) -> Literal["stop", "length"] | None:
    """How a choice ended, in OpenAI's words; ApiError 500 when the engine could not finish it."""
    if delta.finish_reason in ("error", "abort"):
        raise ApiError(500, f"the engine gave up the request: {delta.stop_reason}")
    return delta.finish_reason  # type: ignore[return-value]


class EventStream(StreamingResponse):
    """Closes its generator when the client goes away, so that its requests are aborted at once and not when it is collected."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


def as_api_error(error: Exception) -> ApiError:
    """What is answered when a route raises `error`."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=_PARAMS.get(error.field or "", error.field), code="invalid_value" if error.field else None)
        case EngineLost():
            return ApiError(503, str(error), code="lost")
        case ClientDisconnect():
            return ApiError(499, "the client has gone")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case IngotError():
            return ApiError(500, str(error))
    raise error
