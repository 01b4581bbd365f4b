"""Whatever a client sends is answered, with a 4xx in OpenAI's shape when it is wrong, and other clients notice nothing."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(autouse=True)
def still_serving(server: Any, fake: SimpleNamespace) -> Any:
    """After each test the same server gives a right answer."""
    yield
    with server.http() as http:
        answer = http.post("/v1/completions", json={"prompt": [7, 8], "max_tokens": 3, "temperature": 0, "return_token_ids": True})
    assert answer.json()["choices"][0]["token_ids"] == fake.greedy([7, 8], 3)


@pytest.mark.parametrize(
    ("param", "body"),
    [
        (None, b""),
        (None, b"{"),
        (None, b"[]"),
        (None, b'"text"'),
        (None, b"\xff\xfe"),
        (None, b'{"prompt": "\\ud800"}'),
        (None, b'{"prompt": "a", "stop": ["\\udfff"]}'),
        (None, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
        ("prompt", {}),
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": ["a", ""]}),
        ("prompt", {"prompt": ["a", 1]}),
        ("prompt", {"prompt": [1, 2.5]}),
        ("prompt", {"prompt": [True]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [263]}),
        ("prompt", {"prompt": [10**30]}),
        ("prompt", {"prompt": "a" * 300}),
        ("prompt", {"prompt": "a" * 200_000}),
        ("prompt", {"prompt": "abc", "max_tokens": 298}),
        ("max_tokens", {"prompt": "a", "max_tokens": 0}),
        ("max_tokens", {"prompt": "a", "max_tokens": -1}),
        ("max_tokens", {"prompt": "a", "max_tokens": "5"}),
        ("max_tokens", {"prompt": "a", "max_tokens": 2**40}),
        ("temperature", b'{"prompt": "a", "temperature": NaN}'),
        ("temperature", b'{"prompt": "a", "temperature": Infinity}'),
        ("temperature", b'{"prompt": "a", "temperature": 1e999}'),
        ("temperature", {"prompt": "a", "temperature": "0.5"}),
        ("top_k", {"prompt": "a", "top_k": 10**20}),
        ("n", {"prompt": "a", "n": 0}),
        ("n", {"prompt": "a", "n": 1.5}),
        ("n", {"prompt": "a", "n": 129}),
        ("n", {"prompt": "a", "n": 2, "echo": True, "logprobs": 1}),
        ("best_of", {"prompt": "a", "best_of": 2, "n": 3}),
        ("best_of", {"prompt": "a", "best_of": 0}),
        ("stream", {"prompt": "a", "best_of": 2, "stream": True}),
        ("priority", {"prompt": "a", "priority": 0.5}),
        ("stream", {"prompt": "a", "use_beam_search": True, "stream": True}),
        ("use_beam_search", {"prompt": "a", "use_beam_search": True, "n": 4, "best_of": 3}),
        ("min_p", {"prompt": "a", "use_beam_search": True, "min_p": 0.5}),
        ("early_stopping", {"prompt": "a", "use_beam_search": True, "early_stopping": "always"}),
        ("seed", {"prompt": "a", "seed": 2**70}),
        ("stop", {"prompt": "a", "stop": 5}),
        ("stop", {"prompt": "a", "stop": ["x"] * 17}),
        ("logprobs", {"prompt": "a", "logprobs": 21}),
        ("stream", {"prompt": "a", "stream": "yes"}),
        ("stream_options", {"prompt": "a", "stream_options": {"include_usage": True}}),
        ("stream_options.include_usage", {"prompt": "a", "stream": True, "stream_options": {"include_usage": "yes"}}),
        ("suffix", {"prompt": "a", "suffix": "b"}),
        ("logit_bias", {"prompt": "a", "logit_bias": {"x": 1}}),
        ("logit_bias", {"prompt": "a", "logit_bias": {"-1": 1}}),
        ("logit_bias", {"prompt": "a", "logit_bias": [5]}),
        ("logit_bias", {"prompt": "a", "logit_bias": {"5": "1"}}),
        ("logit_bias", {"prompt": "a", "logit_bias": {"5": 101}}),
        ("logit_bias", {"prompt": "a", "logit_bias": {"263": 1}}),
        ("presence_penalty", {"prompt": "a", "presence_penalty": 2.5}),
        ("frequency_penalty", {"prompt": "a", "frequency_penalty": -2.1}),
        ("repetition_penalty", {"prompt": "a", "repetition_penalty": 0}),
        ("min_tokens", {"prompt": "a", "min_tokens": 17}),
        ("min_tokens", {"prompt": "a", "min_tokens": -1}),
        ("bad_words.0", {"prompt": "a", "bad_words": [5]}),
        ("bad_words", {"prompt": "a", "bad_words": [" "]}),
        ("allowed_token_ids", {"prompt": "a", "allowed_token_ids": [263]}),
        ("allowed_token_ids", {"prompt": "a", "allowed_token_ids": [256], "min_tokens": 1}),
        ("response_format", {"prompt": "a", "response_format": {"type": "json_object"}}),
    ],
)
def test_wrong_completions(http: httpx.Client, param: str | None, body: Any) -> None:
    answer = http.post("/v1/completions", content=body if isinstance(body, bytes) else json.dumps(body))
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("body", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": -0.1}, {"top_k": -2}, {"stop": [""]}])
def test_numbers_out_of_range_are_named(http: httpx.Client, body: dict[str, Any]) -> None:
    for path, extra in (("completions", {"prompt": "a"}), ("chat/completions", CHAT)):
        answer = http.post(f"/v1/{path}", json=extra | body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(f"{next(iter(body))} is ")
        assert answer.json()["error"]["param"] == next(iter(body))


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("messages", {}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "hi"}),
        ("messages.0.role", {"messages": [{"content": "hi"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        ("tools", CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("tool_choice", CHAT | {"tool_choice": "required"}),
        ("response_format", CHAT | {"response_format": {"type": "json_schema"}}),
        ("audio", CHAT | {"audio": {"voice": "x"}}),
        ("top_logprobs", CHAT | {"top_logprobs": 2}),
        ("chat_template_kwargs", CHAT | {"chat_template_kwargs": {"messages": []}}),
        ("prompt", CHAT | {"max_tokens": 298}),
        ("model", CHAT | {"model": 5}),
    ],
)
def test_wrong_chats(http: httpx.Client, param: str, body: Any) -> None:
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_harmless_fields_are_accepted(http: httpx.Client) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "allowed_token_ids": [],
        "bad_words": [],
        "min_tokens": 0,
        "repetition_penalty": 1,
    }
    chat = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"}, "max_completion_tokens": 2}
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "best_of": 1, "suffix": None} | harmless).status_code == 200
    assert http.post("/v1/chat/completions", json=CHAT | chat | harmless).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/audio/speech", 404), ("GET", "/v1/models/x", 404)]
)
def test_wrong_routes_are_told_in_openais_shape(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_another_model_is_404(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", "model": "gpt-7"})
    assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (404, "model_not_found", "model")


def test_a_body_without_end_is_413(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", content=(b"x" * (1 << 20) for _ in range(65)))
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "sent",
    [b"\x00\x01\x02\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"],
)
def test_half_a_request_harms_nobody(server: Any, sent: bytes) -> None:
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port)) as s:
        s.sendall(sent)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)
FIELDS = ("prompt messages model max_tokens max_completion_tokens temperature top_p top_k min_p seed n stop stop_token_ids ignore_eos stream stream_options "
          "logprobs top_logprobs echo suffix tools logit_bias best_of presence_penalty repetition_penalty min_tokens bad_words allowed_token_ids priority "
          "use_beam_search length_penalty early_stopping response_format chat_template_kwargs add_generation_prompt").split()  # fmt: skip
LIKELY = st.sampled_from([0, 1, 2, 16, -1, 0.5, "a", "fake", ["a"], [1, 2], [[1], [2]], True, [{"role": "user", "content": "x"}], {"include_usage": True}])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["completions", "chat/completions"]), st.dictionaries(st.sampled_from(FIELDS), LIKELY | VALUES, max_size=6))
def test_random_bodies_are_answered(http: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    body = {"prompt": "a", "max_tokens": 2, "messages": CHAT["messages"]} | fields
    if fields.get("n", 1) is True or fields.get("max_tokens", 2) is None:
        body["n"] = 1
    answer = http.post(f"/v1/{path}", content=json.dumps(body))
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"] in ("invalid_request_error", "not_found_error")
    elif body.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.json()["choices"]
