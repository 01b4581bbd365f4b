"""One HTTP exchange: reading the body, noticing that the client has gone, streaming events, telling errors."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

import pydantic
from fastapi import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from ingot.ops.errors import IngotError
from ingot.runtime.request import Delta, RequestError

from ..errors import EngineLost
from ..protocol.body import RequestBody
from ..protocol.errors import ApiError, from_validation
from .job import DONE, Job, event

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


def answer(response: pydantic.BaseModel) -> Response:
    """A whole answer as JSON."""
    return Response(response.model_dump_json(), media_type="application/json")


def check(delta: Delta) -> Literal["stop", "length"] | None:
    """How a choice ended, in OpenAI's words; ApiError 500 when the engine could not finish it."""
    if delta.finish_reason in ("error", "abort"):
        raise ApiError(500, f"the engine gave up the request: {delta.stop_reason}")
    return delta.finish_reason  # type: ignore[return-value]


class EventStream(Response):
    """Server-sent events. What fails before the first of them is an ordinary error response; what fails later, an event with the error.

    Its requests are aborted at once when the client goes away, and not when something is collected.
    """

    def __init__(self, job: Job[Any]) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._job = job
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(Request(scope, receive), self._answer(scope, send))
        except ClientDisconnect:
            if not self._started:
                raise

    async def _answer(self, scope: Scope, send: Send) -> None:
        async def say(events: bytes) -> None:
            nonlocal send
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                send = scope[DIRECTLY]  # middlewares look at the start of a response alone
            await send({"type": "http.response.body", "body": events, "more_body": True})

        try:
            async with self._job.generation as generation:
                while arrived := await generation.arrived():
                    if events := self._job.events(arrived):
                        await say(events)
            await say(self._job.last_events())
        except (ApiError, IngotError) as error:
            if not self._started:
                raise
            await say(event(as_api_error(error).body) + DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


DIRECTLY = "ingot.send"
"""In a scope: the server's own `send`."""


def sending_directly(app: ASGIApp) -> ASGIApp:
    """The application, whose scopes have `DIRECTLY`."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope[DIRECTLY] = send
        await app(scope, receive, send)

    return call


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
