"""From loading to the last request drained: what a server answers, and how it ends."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def until(what: Callable[[], Any], seconds: float = 30) -> Any:
    """Try again until `what` gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if result := what():
                return result
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise AssertionError("it never happened")


def sequences(http: httpx.Client, state: str) -> float:
    line = next(row for row in http.get("/metrics").text.splitlines() if row.startswith(f'ingot_sequences{{state="{state}"}}'))
    return float(line.split()[-1])


def pages_used(http: httpx.Client) -> float:
    line = next(row for row in http.get("/metrics").text.splitlines() if row.startswith("ingot_kv_pages") and '"used"' in row)
    return float(line.split()[-1])


def test_health_says_loading_then_ready(start: Callable[..., Any]) -> None:
    server = start("load_slowly", wait=False, port=free_port())
    with server.http() as http:
        answer = until(lambda: http.get("/health"))
        assert (answer.status_code, answer.json()["status"]) == (503, "loading")
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        server.wait_ready()
        assert (http.get("/health").status_code, http.get("/health").json()["status"]) == (200, "ready")
    server.signal(signal.SIGINT)
    assert server.wait() == 0
    assert any("load weights" in line for line in server.errors)


def test_an_engine_that_cannot_load_is_one_message_and_exit_code_1(start: Callable[..., Any]) -> None:
    server = start("load_nothing", wait=False)
    server.process.wait(timeout=60)
    assert server.wait() == 1
    assert "the model needs 3 GB more than there are; lower --max-model-len" in server.errors[-1]
    assert "EngineLost" in server.errors[-1]  # `run` raises it; the command line prints the message alone


def test_a_dead_engine_is_503_then_exit_code_1(start: Callable[..., Any], fake: SimpleNamespace) -> None:
    server = start()
    with server.http() as http:
        lost = http.post("/v1/completions", json={"prompt": [1, fake.CRASH, 3]})
        assert (lost.status_code, lost.json()["error"]["code"]) == (503, "lost")
        assert (http.get("/health").status_code, http.get("/health").json()["status"]) == (503, "lost")
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 503
    assert server.wait() == 1


@pytest.fixture(scope="module")
def slow(start: Callable[..., Any]) -> Any:
    """Steps of 20 ms: requests that are under way when something happens to them."""
    return start("load_slow_steps", options={"max_model_len": 1000}, drain_seconds=20)


@pytest.fixture
def slow_http(slow: Any) -> Iterator[httpx.Client]:
    with slow.http() as client:
        yield client


def aborted(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(row.split()[-1]) for row in lines if row.startswith('ingot_requests_total{finish_reason="abort"}'))


LONG = {"prompt": "a long story", "max_tokens": 900, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_pages(slow: Any, slow_http: httpx.Client, stream: bool) -> None:
    before = aborted(slow_http)
    body = LONG | {"stream": stream, "n": 3, "temperature": 0.7}
    if stream:
        with slow.http() as client, client.stream("POST", "/v1/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
    else:
        with slow.http() as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.5)
    until(lambda: sequences(slow_http, "running") + sequences(slow_http, "waiting") == 0)
    assert pages_used(slow_http) == 0
    assert aborted(slow_http) == before + 3


def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones(slow: Any, slow_http: httpx.Client) -> None:
    with slow_http.stream("POST", "/v1/completions", json={"prompt": "one more", "max_tokens": 80, "stream": True, "ignore_eos": True}) as response:
        lines = response.iter_lines()
        next(lines)
        with slow.http() as other:
            assert other.get("/health").status_code == 200
            slow.signal(signal.SIGTERM)
            until(lambda: other.get("/health").status_code == 503)
            refused = other.post("/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        rest = [line for line in lines if line]
    assert len(rest) > 40  # tokens come when they are there
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert slow.wait() == 0
    assert not any("Traceback" in line for line in slow.errors)


def test_a_drain_ends_at_its_time_limit(start: Callable[..., Any]) -> None:
    server = start("load_slow_steps", options={"max_model_len": 1000}, drain_seconds=0.3)
    with server.http() as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        begin = time.monotonic()
        server.signal(signal.SIGTERM)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    assert server.wait() == 0
    assert time.monotonic() - begin < 8


def test_the_api_key_is_asked_for_and_tokens_need_no_tokenizer(start: Callable[..., Any], artifact_without_tokenizer: Path, fake: SimpleNamespace) -> None:
    server = start(path=artifact_without_tokenizer, api_key="se-crét")
    with server.http() as http:
        for headers in ({}, {"authorization": "Bearer se"}, {"authorization": "se-crét".encode()}):
            refused = http.get("/v1/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert http.post("/v1/chat/completions", json={}).status_code == 401
        assert http.get("/health").status_code == http.get("/metrics").status_code == 200
    with server.http(headers={"authorization": "Bearer se-crét".encode()}) as http:
        assert http.get("/v1/models").status_code == 200
        answer = http.post("/v1/completions", json={"prompt": [3, 1, 4], "max_tokens": 5, "temperature": 0, "return_token_ids": True, "logprobs": 1}).json()
        assert answer["choices"][0]["token_ids"] == fake.greedy([3, 1, 4], 5)
        assert answer["choices"][0]["logprobs"]["tokens"] == [f"token_id:{t}" for t in fake.greedy([3, 1, 4], 5)]
        for path, body in (("completions", {"prompt": "text"}), ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]})):
            refused = http.post(f"/v1/{path}", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_tokenizer")
        refused = http.post("/v1/completions", json={"prompt": [1], "stop": "x"})
        assert refused.status_code == 400
        assert "stop strings need a tokenizer" in refused.json()["error"]["message"]


def metric(http: httpx.Client, start: str) -> float:
    return sum(float(row.split()[-1]) for row in http.get("/metrics").text.splitlines() if row.startswith(start))


@pytest.fixture(scope="module")
def workers(start: Callable[..., Any]) -> Any:
    """Three API processes before one engine."""
    return start("load_slow_steps", options={"max_model_len": 1000}, api_workers=3, drain_seconds=20)


def test_several_api_processes_answer_for_one_engine_and_count_together(workers: Any, fake: SimpleNamespace) -> None:
    prompts = [[i, i + 1] for i in range(24)]
    with workers.http(limits=httpx.Limits(max_keepalive_connections=0)) as http:  # a connection each: the kernel divides them
        for prompt in prompts:
            body = {"prompt": prompt, "max_tokens": 5, "temperature": 0, "return_token_ids": True}
            assert http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"] == fake.greedy(prompt, 5)
        for _ in range(4):  # whoever answers
            assert metric(http, 'ingot_requests_total{finish_reason="length"}') == 24
            assert metric(http, "ingot_generation_tokens_total") == 24 * 5
            assert metric(http, "ingot_ready_seconds") > 0
        until(lambda: metric(http, "ingot_sequences{") == 0)


def test_sigterm_drains_all_api_processes(workers: Any) -> None:
    clients = [workers.http() for _ in range(8)]
    try:
        body = LONG | {"max_tokens": 60, "stream": True}
        streams = [c.stream("POST", "/v1/completions", json=body) for c in clients]
        lines = [s.__enter__().iter_lines() for s in streams]
        for each in lines:
            assert next(each).startswith("data: ")
        workers.signal(signal.SIGTERM)
        for each, stream in zip(lines, streams, strict=True):
            rest = [line for line in each if line]
            assert rest[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in rest[-2]
            stream.__exit__(None, None, None)
    finally:
        for client in clients:
            client.close()
    assert workers.wait() == 0
    assert not any("Traceback" in line for line in workers.errors)


def test_a_dead_engine_ends_all_api_processes(start: Callable[..., Any], fake: SimpleNamespace) -> None:
    server = start(api_workers=2)
    with server.http() as http:
        lost = http.post("/v1/completions", json={"prompt": [1, fake.CRASH, 3]})
        assert (lost.status_code, lost.json()["error"]["code"]) == (503, "lost")
    assert server.wait() == 1
