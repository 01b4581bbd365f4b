"""/v1/completions against the fake engine, through the real server and the real OpenAI client."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

TEXT = "import os\nü"


def prompts(fake: SimpleNamespace, count: int, seed: int = 5) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(fake.EOS) for _ in range(rng.randint(1, 40))] for _ in range(count)]


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_text_streams_to_what_is_answered_at_once(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="fake", prompt=TEXT, max_tokens=23, temperature=0)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (12, 23, 35)
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(model="fake", prompt=TEXT, max_tokens=23, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert [c.usage is None for c in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []
    assert len({c.id for c in chunks}) == 1


def test_token_ids_give_the_models_tokens(http: httpx.Client, fake: SimpleNamespace) -> None:
    asked = prompts(fake, 7)
    answer = post(http, prompt=asked, max_tokens=9, temperature=0, return_token_ids=True)
    assert [c["index"] for c in answer["choices"]] == list(range(7))
    assert [c["token_ids"] for c in answer["choices"]] == [fake.greedy(p, 9) for p in asked]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, asked))
    one = post(http, prompt=asked[3], max_tokens=9, temperature=0, return_token_ids=True)
    assert one["choices"][0]["token_ids"] == fake.greedy(asked[3], 9)
    assert "token_ids" not in post(http, prompt=asked[3], max_tokens=1)["choices"][0]


def test_n_choices_for_each_of_several_texts(http: httpx.Client) -> None:
    body = {"prompt": ["def f", "class Foo"], "n": 3, "max_tokens": 12, "temperature": 1.5, "seed": 11}
    answer = post(http, **body)
    texts = [c["text"] for c in answer["choices"]]
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    assert len(set(texts)) == 6
    assert answer["usage"]["prompt_tokens"] == len("def f") + len("class Foo")
    assert answer["usage"]["completion_tokens"] == 6 * 12
    assert [c["text"] for c in post(http, **body)["choices"]] == texts
    assert [c["text"] for c in post(http, **body | {"seed": 12})["choices"]] != texts


def test_logprobs_are_the_models(http: httpx.Client, fake: SimpleNamespace) -> None:
    prompt = next(p for p in prompts(fake, 500) if max(fake.greedy(p, 3)) < 94)  # the printable ASCII characters: a token each
    choice = post(http, prompt=prompt, max_tokens=3, temperature=0, logprobs=2, return_token_ids=True)["choices"][0]
    tokens, shown = prompt + choice["token_ids"], choice["logprobs"]
    expected = [fake.logprob(tokens[i - 1], i - 1, tokens[i]) for i in range(len(prompt), len(tokens))]
    assert shown["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert [max(top.values()) for top in shown["top_logprobs"]] == pytest.approx(expected, abs=1e-4)
    assert "".join(shown["tokens"]) == choice["text"]
    assert shown["text_offset"] == [0, 1, 2]


@pytest.mark.parametrize("max_tokens", [0, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_shows_the_prompt_and_its_logprobs(client: openai.OpenAI, http: httpx.Client, fake: SimpleNamespace, max_tokens: int, stream: bool) -> None:
    ids = post(http, prompt=TEXT, max_tokens=max(max_tokens, 1), temperature=0, echo=True, return_token_ids=True)["choices"][0]["token_ids"]
    expected = [fake.logprob(ids[i - 1], i - 1, ids[i]) for i in range(1, 12 + max_tokens)]
    options = {"model": "fake", "prompt": TEXT, "max_tokens": max_tokens, "temperature": 0, "echo": True, "logprobs": 0}
    pieces = list(client.completions.create(**options, stream=True)) if stream else [client.completions.create(**options)]
    text = "".join(p.choices[0].text for p in pieces)
    values = [v for p in pieces for v in p.choices[0].logprobs.token_logprobs]
    assert text.startswith(TEXT)
    assert (len(text) > len(TEXT)) == bool(max_tokens)
    assert values[0] is None
    assert values[1:] == pytest.approx(expected, abs=1e-4)


def test_stop_strings_and_ids_end_the_text_before_them(http: httpx.Client, fake: SimpleNamespace) -> None:
    prompt = list(b"\x10 some prompt")
    text = post(http, prompt=prompt, max_tokens=40, temperature=0)["choices"][0]["text"]
    words = [text[i : i + 2] for i in range(10, 30) if "�" not in text[i : i + 2]]
    stop = words[0]
    choice = post(http, prompt=prompt, max_tokens=40, temperature=0, stop=["not there", stop])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    token = fake.greedy(prompt, 6)[5]
    choice = post(http, prompt=prompt, max_tokens=40, temperature=0, stop_token_ids=[token], return_token_ids=True)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert len(choice["token_ids"]) <= 6


def test_max_tokens_defaults_to_16_and_null_fills_the_context(http: httpx.Client) -> None:
    assert post(http, prompt="abc")["usage"]["completion_tokens"] == 16
    assert post(http, prompt="a" * 290)["usage"]["completion_tokens"] == 10
    assert post(http, prompt="abc", max_tokens=None)["usage"]["completion_tokens"] == 297


def test_prefix_cache_shows_in_the_usage(http: httpx.Client) -> None:
    body = {"prompt": "the same words twice, " * 4, "max_tokens": 2}
    post(http, **body)
    assert post(http, **body)["usage"]["prompt_tokens_details"]["cached_tokens"] > 60


def test_fifty_concurrent_streams_get_each_its_own_tokens(server: Any, fake: SimpleNamespace) -> None:
    asked = prompts(fake, 50, seed=9)

    async def one(client: openai.AsyncOpenAI, prompt: list[int]) -> list[int]:
        stream = await client.completions.create(model="fake", prompt=prompt, max_tokens=31, temperature=0, stream=True, extra_body={"return_token_ids": True})
        return [t async for chunk in stream for t in chunk.choices[0].token_ids]  # type: ignore[attr-defined]

    async def all_of_them() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(one(client, p) for p in asked))

    assert asyncio.run(all_of_them()) == [fake.greedy(p, 31) for p in asked]


def test_logits_are_biased_penalized_and_restricted_by_request(http: httpx.Client, fake: SimpleNamespace) -> None:
    def answer(**rules: Any) -> list[int]:
        return post(http, prompt=[7, 8], max_tokens=12, temperature=0, return_token_ids=True, **rules)["choices"][0]["token_ids"]

    plain = fake.greedy([7, 8], 12)
    assert answer() == plain
    assert answer(logit_bias={str(plain[0]): -100})[0] != plain[0]
    assert answer(logit_bias={"65": 100}) == [65] * 12
    assert set(answer(allowed_token_ids=[70, 71])) <= {70, 71}
    assert answer(logit_bias={"65": 30}, frequency_penalty=2, presence_penalty=1).count(65) < 12
    assert answer(logit_bias={"65": 30}, repetition_penalty=20).count(65) < 12
    assert answer(logit_bias={"65": 100}, bad_words=[chr(33 + 65) * 2]).count(65) < 12  # the byte tokenizer's token 65 is "b"
    assert answer(logit_bias={str(fake.EOS): 100}) == [fake.EOS]
    late = answer(logit_bias={str(fake.EOS): 100}, min_tokens=5)
    assert late.index(fake.EOS) == 5


def test_rules_work_in_chats_and_for_openais_client(client: openai.OpenAI) -> None:
    rules: dict[str, Any] = {"logit_bias": {"65": 100}, "frequency_penalty": 0.5, "presence_penalty": 0.5}
    chat = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=5,
        extra_body={"min_tokens": 2, "repetition_penalty": 1.1, "priority": -1},
        **rules,
    )
    assert chat.choices[0].message.content == "bbbbb"


def test_the_best_of_several_come_first(http: httpx.Client) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 1.3, "seed": 4, "logprobs": 0, "return_token_ids": True}
    every = post(http, **body, n=5)["choices"]
    ranked = sorted(every, key=lambda c: -sum(c["logprobs"]["token_logprobs"]))
    best = post(http, **body, n=2, best_of=5)["choices"]
    assert [(c["index"], c["token_ids"]) for c in best] == [(i, ranked[i]["token_ids"]) for i in range(2)]


def test_beam_search_answers_the_most_probable(http: httpx.Client) -> None:
    body = {"prompt": ["x", "yz"], "max_tokens": 6, "logprobs": 1, "return_token_ids": True}
    searched = post(http, **body, use_beam_search=True, n=3, best_of=5, length_penalty=0.0, early_stopping="never", temperature=0)["choices"]
    greedy = post(http, **body, temperature=0)["choices"]
    assert [c["index"] for c in searched] == list(range(6))
    for i in range(2):
        scores = [sum(c["logprobs"]["token_logprobs"]) for c in searched[3 * i : 3 * i + 3]]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] >= sum(greedy[i]["logprobs"]["token_logprobs"]) - 1e-5
        assert len({tuple(c["token_ids"]) for c in searched[3 * i : 3 * i + 3]}) == 3
        assert all(len(c["token_ids"]) == 6 and c["finish_reason"] == "length" and len(c["text"]) > 0 for c in searched)
