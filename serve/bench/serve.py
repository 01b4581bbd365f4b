"""`ingot bench serve`: any OpenAI endpoint under a load, as its clients see it.

time to first token: from sending a request to the first event with text or a token. inter-token latency: between two
such events of one request. time per output token: from the first event to the last, over the tokens after the first.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import uvloop

from .sse import Endpoint, RequestFailed
from .workload import Call


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None

    @property
    def says_something(self) -> bool:
        return bool(self.text or self.token_ids or (self.delta is not None and (self.delta.content or self.delta.reasoning_content)))


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass
class Outcome:
    """Of one request: seconds since the start at which it was sent and its events came; what the server says it used; why it failed."""

    sent: float
    events: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Load:
    """How the calls are made. `concurrency`: at most so many at a time; None: as they come."""

    endpoint: Endpoint
    model: str | None = None  # None: the first that the server lists
    chat: bool = False
    temperature: float = 0.0
    ignore_eos: bool = True
    concurrency: int | None = None
    timeout: float = 600.0


def run(load: Load, calls: Sequence[Call], progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Send the calls; the summary of what came back. Raises RequestFailed when the server cannot be asked for its models."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        model, outcomes = runner.run(_send(load, calls, progress))
    return {"url": load.endpoint.url, "model": model, "concurrency": load.concurrency, **summary(outcomes)}


async def _send(load: Load, calls: Sequence[Call], progress: Callable[[str, float], None]) -> tuple[str, list[Outcome]]:
    model = load.model
    if model is None:
        listed = msgspec.json.decode(await load.endpoint.get("/v1/models"), type=_Models)
        if not listed.data:
            raise RequestFailed(f"{load.endpoint.url} lists no model; name one with --model")
        model = listed.data[0].id
    free = asyncio.Semaphore(load.concurrency or len(calls))
    begin, done = time.perf_counter(), 0

    async def one(call: Call) -> Outcome:
        nonlocal done
        await asyncio.sleep(call.at - (time.perf_counter() - begin))
        async with free:
            outcome = Outcome(time.perf_counter() - begin)
            try:
                async with asyncio.timeout(load.timeout):
                    await _receive(load, _body(load, model, call), outcome, begin)
            except RequestFailed as error:
                outcome.error = str(error)
            except TimeoutError:
                outcome.error = f"no end after {load.timeout:g} s"
            outcome.ended = time.perf_counter() - begin
        done += 1
        progress("requests", done / len(calls))
        return outcome

    return model, await asyncio.gather(*map(one, calls))


def _body(load: Load, model: str, call: Call) -> bytes:
    prompt = {"messages": [{"role": "user", "content": call.prompt}]} if load.chat else {"prompt": call.prompt}
    options = {"max_tokens": call.max_tokens, "temperature": load.temperature, "stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode({"model": model, **prompt, **options, **({"ignore_eos": True} if load.ignore_eos else {})})


async def _receive(load: Load, body: bytes, outcome: Outcome, begin: float) -> None:
    async for data in load.endpoint.events("/v1/chat/completions" if load.chat else "/v1/completions", body):
        now = time.perf_counter() - begin
        try:
            event = _decode(data)
        except msgspec.DecodeError as error:
            raise RequestFailed(f"not an event of OpenAI's: {data[:200]!r} ({error})") from error
        if event.error is not None:
            raise RequestFailed(f"the server gave up: {event.error}")
        if any(choice.says_something for choice in event.choices):
            outcome.events.append(now)
        if event.usage is not None:
            outcome.prompt_tokens, outcome.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Throughput of what succeeded over the time of everything, latencies of what succeeded in milliseconds, and the errors by message."""
    good = [o for o in outcomes if not o.error]
    seconds = max(o.ended for o in outcomes) - min(o.sent for o in outcomes)
    output = sum(o.output_tokens for o in good)
    per_token = [(o.events[-1] - o.events[0]) / (o.output_tokens - 1) for o in good if len(o.events) > 1 and o.output_tokens > 1]
    return {
        "requests": len(outcomes),
        "errors": len(outcomes) - len(good),
        "error_messages": dict(Counter(o.error for o in outcomes if o.error).most_common(5)),
        "seconds": seconds,
        "prompt_tokens": sum(o.prompt_tokens for o in good),
        "output_tokens": output,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (output + sum(o.prompt_tokens for o in good)) / seconds,
        "mean_running": sum(o.ended - o.sent for o in outcomes) / seconds,
        "time_to_first_token_ms": _spread([o.events[0] - o.sent for o in good if o.events]),
        "time_per_output_token_ms": _spread(per_token),
        "inter_token_latency_ms": _spread([b - a for o in good for a, b in zip(o.events, o.events[1:], strict=False)]),
        "request_latency_ms": _spread([o.ended - o.sent for o in good]),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99)) * 1e3
    return {"mean": float(np.mean(seconds) * 1e3), "p50": float(p50), "p90": float(p90), "p99": float(p99)}
