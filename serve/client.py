"""The server's side of the engine: requests out, deltas back to whoever waits for them."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import numpy as np

from ingot.runtime.request import Delta, Request, RequestError, SamplingParams

from .errors import EngineLost
from .messages import Abort, Add, Command, Embed, Embedded, Failed, Loading, Ready, Rejected, Step, decode_event, frame, take_frames
from .metrics import Metrics, Timer


class Generation:
    """The answers to some prompts, read as one stream. Leaving the `async with` block aborts those that have not ended."""

    def __init__(self, client: EngineClient, prompts: Sequence[list[int]], params: SamplingParams, priority: int) -> None:
        self._client = client
        self._prompts = prompts
        self._params = params
        self._priority = priority
        self._ids: list[str] = []
        self._num_open = len(prompts) * params.n
        self._arrived: list[tuple[int, Delta]] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        for i, prompt in enumerate(self._prompts):
            self._ids.append(self._client.begin(self, i * self._params.n, prompt, self._params, self._priority))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.abort(self._ids)

    async def arrived(self) -> list[tuple[int, Delta]]:
        """(choice, delta): all that came since the last time, one delta a choice; [] when every choice has ended. Choices of prompt i are
        i·n … i·n + n − 1.

        Raises RequestError or EngineLost.
        """
        if self._num_open and not self._arrived and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        arrived, self._arrived = self._arrived, []
        return arrived if len(arrived) < 2 else _merged(arrived)

    def put(self, choice: int, delta: Delta) -> None:
        self._arrived.append((choice, delta))
        self._num_open -= delta.finish_reason is not None
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _merged(arrived: list[tuple[int, Delta]]) -> list[tuple[int, Delta]]:
    """One delta for each choice: a reader that is behind catches up in one step."""
    parts: dict[int, list[Delta]] = {}
    for choice, delta in arrived:
        parts.setdefault(choice, []).append(delta)
    return [(choice, deltas[0] if len(deltas) == 1 else _join(deltas)) for choice, deltas in parts.items()]


def _join(deltas: list[Delta]) -> Delta:
    """What the deltas of one continuation say together."""
    first, last = deltas[0], deltas[-1]
    scored = [d.logprobs for d in deltas if d.logprobs is not None]
    return Delta(
        first.request_id,
        first.index,
        [t for d in deltas for t in d.token_ids],
        "".join([d.text for d in deltas]),
        [p for logprobs in scored for p in logprobs] if scored else None,
        next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
        last.finish_reason,
        last.stop_reason,
        next((d.usage for d in reversed(deltas) if d.usage is not None), None),
    )


@dataclass(slots=True)
class _Running:
    """A request in the engine, until each of its continuations has ended."""

    generation: Generation
    first_choice: int
    timers: list[Timer]
    num_open: int


class EngineClient(asyncio.Protocol):
    """A connection to an engine's process.

    `ready` ends with the engine's `Ready` or with EngineLost; `lost` when the process has gone, for whatever reason.
    """

    def __init__(self, metrics: Metrics, name: str) -> None:
        loop = asyncio.get_running_loop()
        self.loading = Loading("starting", 0.0)
        self.ready: asyncio.Future[Ready] = loop.create_future()
        self.lost: asyncio.Future[EngineLost] = loop.create_future()
        self._metrics = metrics
        self._transport: asyncio.Transport
        self._buffer = bytearray()
        self._name = name
        self._numbers = itertools.count()
        self._running: dict[str, _Running] = {}
        self._embeddings: dict[str, asyncio.Future[bytes]] = {}
        self._failure = "the engine's process ended unexpectedly; its last words are on stderr"

    @classmethod
    async def connect(cls, sock: socket.socket, metrics: Metrics, name: str) -> Self:
        """Speak to the engine at the other end of `sock`, which tells its clients' requests apart by their names."""
        _, client = await asyncio.get_running_loop().create_connection(lambda: cls(metrics, name), sock=sock)
        return client

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._embeddings)

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams, priority: int = 0) -> Generation:
        """Ask for answers; the requests begin when the Generation is entered."""
        return Generation(self, prompts, params, priority)

    async def embed(self, texts: list[list[int]], pooling: int) -> np.ndarray:
        """Embeddings, not normalized, float32 [n, D] of checked texts. EngineLost; a call that is cancelled is taken back."""
        if self.lost.done():
            raise self.lost.result()
        request_id, begin = self._next_id(), time.perf_counter()
        answer = self._embeddings[request_id] = asyncio.get_running_loop().create_future()
        self._send(Embed(request_id, texts, pooling))
        try:
            vectors = np.frombuffer(await answer, np.float32).reshape(len(texts), -1)
        finally:
            del self._embeddings[request_id]
            if not answer.done() or answer.cancelled():
                self._send(Abort([request_id]))
        self._metrics.embedded(texts, time.perf_counter() - begin)
        return vectors

    def close(self) -> None:
        """Let go of the engine, which ends its process."""
        self._transport.close()

    def begin(self, generation: Generation, first_choice: int, prompt: list[int], params: SamplingParams, priority: int) -> str:
        """Send one request, whose continuations are choices from `first_choice` on; its id. EngineLost when there is nobody to send it to."""
        if self.lost.done():
            raise self.lost.result()
        request_id = self._next_id()
        self._running[request_id] = _Running(generation, first_choice, self._metrics.begin(len(prompt), params.n), params.n)
        self._send(Add(Request(request_id, prompt, params, priority)))
        return request_id

    def _next_id(self) -> str:
        return f"{self._name}-{next(self._numbers)}"

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests and free what they hold; those that have ended are ignored."""
        open_ids = [r for r in request_ids if r in self._running]
        for request_id in open_ids:
            for timer in self._running.pop(request_id).timers:
                timer.end("abort")
        if open_ids and not self.lost.done():
            self._send(Abort(open_ids))

    def _send(self, command: Command) -> None:
        self._transport.write(frame(command))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods without the class

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        for body in take_frames(self._buffer):
            match decode_event(body):
                case Step(deltas=deltas, stats=stats):
                    self._metrics.stats = stats
                    now = time.perf_counter()
                    for delta in deltas:
                        self._deliver(delta, now)
                    self._metrics.generated(deltas.num_tokens)
                case Embedded(request_id=request_id, vectors=vectors):
                    answer = self._embeddings.get(request_id)
                    if answer is not None and not answer.done():  # or else it was taken back
                        answer.set_result(vectors)
                case Rejected(request_id=request_id, message=message, field=field):
                    self._end(request_id, RequestError(message, field))
                case Loading() as loading:
                    self.loading = loading
                case Ready() as ready:
                    self.ready.set_result(ready)
                case Failed(message=message):
                    self._failure = message

    def _deliver(self, delta: Delta, now: float) -> None:
        running = self._running.get(delta.request_id)
        if running is None:  # aborted while the engine worked on it
            return
        timer = running.timers[delta.index]
        timer.tokens(len(delta.token_ids), now)
        if delta.finish_reason is not None:
            timer.end(delta.finish_reason)
            running.num_open -= 1
            if not running.num_open:
                del self._running[delta.request_id]
        running.generation.put(running.first_choice + delta.index, delta)

    def _end(self, request_id: str, error: Exception) -> None:
        running = self._running.pop(request_id, None)
        if running is not None:
            for timer in running.timers:
                timer.end("error")
            running.generation.fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        error = EngineLost(self._failure)
        self.lost.set_result(error)
        if not self.ready.done():
            self.ready.set_exception(error)
        for request_id in list(self._running):
            self._end(request_id, error)
        for answer in self._embeddings.values():
            if not answer.done():
                answer.set_exception(error)
