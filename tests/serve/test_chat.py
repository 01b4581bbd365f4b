"""/v1/chat/completions against the fake engine, through the real server and the real OpenAI client."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import openai
import pytest

MESSAGES = [{"role": "user", "content": "Why is grass green?"}]
CONVERSATION = [
    *MESSAGES,
    {"role": "assistant", "content": "Chlorophyll."},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "water?"}]},
]


def test_the_template_makes_the_prompt(http: httpx.Client, client: openai.OpenAI) -> None:
    rendered = "<|user|>Why is grass green?<|assistant|>Chlorophyll.<|user|>And water?<|assistant|>"
    plain = http.post("/v1/completions", json={"prompt": rendered, "max_tokens": 15, "temperature": 0}).json()
    answer = client.chat.completions.create(model="fake", messages=CONVERSATION, max_completion_tokens=15, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == plain["choices"][0]["text"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == plain["usage"]["prompt_tokens"] == 4 + len("Why is grass green?Chlorophyll.And water?")


def test_streams_to_what_is_answered_at_once(client: openai.OpenAI) -> None:
    options = {"model": "fake", "messages": MESSAGES, "max_tokens": 20, "temperature": 1.2, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert chunks[-1].usage == whole.usage.model_copy(update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details})
    for choice in whole.choices:
        pieces = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(p.delta.content or "" for p in pieces) == choice.message.content
        assert [p.delta.role for p in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
        assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
        assert [e for p in pieces for e in p.logprobs.content] == choice.logprobs.content
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_logprobs_are_the_models(client: openai.OpenAI, fake: SimpleNamespace) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=7, temperature=0, logprobs=True, top_logprobs=2)  # type: ignore[arg-type]
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content
    assert entries is not None
    assert len(entries) == 7
    assert bytes(b for e in entries for b in e.bytes or []).decode(errors="replace") == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert entry.top_logprobs[1].logprob <= entry.logprob < 0
    first = fake.logprob(258, 2 + len("Why is grass green?") - 1, fake.greedy([258] * (2 + len("Why is grass green?")), 1)[0])
    assert entries[0].logprob == pytest.approx(first, abs=1e-4)


def test_without_a_limit_the_answer_fills_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, temperature=0)  # type: ignore[arg-type]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 300


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").model_dump()["max_model_len"] == 300
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
