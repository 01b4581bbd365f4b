"""`ingot bench serve` against the server over the fake engine, and against sockets that misbehave."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.serve.bench import serve
from ingot.serve.bench.sse import Endpoint
from ingot.serve.bench.workload import Call, Lengths, WorkloadError, arrivals, random_prompts, read_prompts


def run(url: str, calls: list[Call], **load: Any) -> dict[str, Any]:
    return serve.run(serve.Load(Endpoint(url), **load), calls, lambda stage, fraction: None)


def test_the_command_tells_what_clients_saw(server: Any) -> None:
    flags = "--requests 12 --concurrency 3 --prompt-tokens 4:9 --output-tokens 2:20 --vocab-size 250 --json".split()
    done = subprocess.run([sys.executable, "-m", "ingot.serve.cli", "bench", "serve", f"{server.url}/v1", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    random = np.random.default_rng(0)
    asked = [Lengths(4, 9).draw(random, 12), Lengths(2, 20).draw(random, 12)]
    assert (shown["model"], shown["requests"], shown["errors"]) == ("fake", 12, 0)
    assert (shown["prompt_tokens"], shown["output_tokens"]) == (sum(asked[0]), sum(asked[1]))
    assert shown["output_tokens_per_second"] == pytest.approx(shown["output_tokens"] / shown["seconds"])
    assert 0 < shown["mean_running"] <= 3
    for name in ("time_to_first_token_ms", "time_per_output_token_ms", "inter_token_latency_ms", "request_latency_ms"):
        spread = shown[name]
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"]
        assert spread["mean"] > 0


def test_latencies_are_those_of_the_steps(start: Callable[..., Any]) -> None:
    """Steps of 20 ms: a token each of them, at a rate that the server keeps up with."""
    server = start("load_slow_steps")
    shown = run(server.url, [Call([5, 6, 7], 10, 0.05 * i) for i in range(6)])
    assert shown["errors"] == 0
    assert shown["request_latency_ms"]["p50"] > 9 * 20
    # a client that is not woken in time finds several tokens in the first event, and fewer steps after it
    assert 5 < shown["time_per_output_token_ms"]["p50"] < shown["request_latency_ms"]["p99"] / 9
    assert shown["request_latency_ms"]["mean"] > shown["time_to_first_token_ms"]["mean"]
    assert shown["seconds"] > 0.05 * 5 + 0.2  # requests wait for their second
    server.close()


def test_errors_are_counted_by_message_and_left_out_of_latencies(server: Any) -> None:
    shown = run(server.url, [Call([5], 4, 0.0), Call([5], 4000, 0.0), Call([5], 5000, 0.0), Call("chat without a text", 3, 0.0)])
    assert (shown["requests"], shown["errors"], shown["output_tokens"]) == (4, 2, 7)
    assert all("HTTP 400" in m and "context" in m for m in shown["error_messages"])
    nothing = run(server.url, [Call([5], 4000, 0.0)])
    assert (nothing["errors"], nothing["time_to_first_token_ms"], nothing["output_tokens_per_second"]) == (1, None, 0.0)


def test_chat_and_text(server: Any) -> None:
    random = np.random.default_rng(1)
    prompts = random_prompts(random, [3, 5], None)
    assert [len(p.split()) for p in prompts] == [3, 5]  # type: ignore[union-attr]
    shown = run(server.url, [Call(p, 6, 0.0) for p in prompts], chat=True, temperature=0.5)
    assert (shown["errors"], shown["output_tokens"]) == (0, 12)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "broke off"),
        (b"hello\r\n\r\n", "not an answer of HTTP"),
        (b"HTTP/1.1 500 Oops\r\n\r\nno engine", "HTTP 500: no engine"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\": []}\n\n", r"ended without \[DONE\]"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {\"error\": {\"message\": \"lost\"}}\n\ndata: [DONE]\n\n", "lost"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\": 3}\n\n", "not an event of OpenAI's"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n40\r\ndata: ", "broke off"),
    ],
)  # fmt: skip
def test_a_server_that_misbehaves_is_an_error_of_its_request(answer: bytes, message: str) -> None:
    async def talk() -> dict[str, Any]:
        async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        listening = await asyncio.start_server(reply, "127.0.0.1", 0)
        async with listening:
            url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            _, outcomes = await serve._send(serve.Load(Endpoint(url), "m"), [Call("x", 1, 0.0)], lambda stage, fraction: None)
        return serve.summary(outcomes)

    shown = asyncio.run(talk())
    assert shown["errors"] == 1
    assert re.search(message, next(iter(shown["error_messages"])))


def test_lengths_files_and_arrivals(tmp_path: Path) -> None:
    assert Lengths.parse("128") == Lengths(128, 128)
    assert Lengths.parse("3:5") == Lengths(3, 5)
    for wrong in ("", "0", "5:3", "a", "3:", "-1"):
        with pytest.raises(WorkloadError, match="not a number of tokens"):
            Lengths.parse(wrong)
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n\n{"prompt": [1, 2]}\n')
    assert read_prompts(path, 3) == ["one", [1, 2], "one"]
    for text, message in (("", "no prompts"), ("[3", "cannot be read"), ("{}", "neither a string")):
        path.write_text(text)
        with pytest.raises(WorkloadError, match=message):
            read_prompts(path, 1)
    times = arrivals(np.random.default_rng(0), 4000, 50.0)
    gaps = np.diff(times)
    assert times[-1] == pytest.approx(80, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as of an exponential distribution
    assert arrivals(np.random.default_rng(0), 3, None) == [0.0] * 3
