"""/v1/embeddings over HTTP: OpenAI's shapes, texts of concurrent requests in one step, and what is refused."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
import tokenizers


@pytest.fixture(scope="module")
def url(start: Callable[..., SimpleNamespace], encoder: Path) -> str:
    return start("load_encoder", path=encoder).url


@pytest.fixture(scope="module")
def ids(encoder: Path) -> Callable[[str], list[int]]:
    tokenizer = tokenizers.Tokenizer.from_file(str(encoder / "tokenizer" / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_openai_client(url: str, fake: SimpleNamespace, ids: Callable[[str], list[int]]) -> None:
    """It asks for base64 when it is not told otherwise."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        for form in ({}, {"encoding_format": "float"}):
            answer = client.embeddings.create(model="fake", input=["bread", "a longer text"], **form)
            assert [d.index for d in answer.data] == [0, 1]
            for text, d in zip(("bread", "a longer text"), answer.data, strict=True):
                np.testing.assert_allclose(d.embedding, unit(fake.embedding(ids(text), "mean")), rtol=1e-5)
            assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == ("fake", 18, 18)


def test_forms_of_the_input(http: httpx.Client, fake: SimpleNamespace, ids: Callable[[str], list[int]]) -> None:
    tokens = ids("br")
    for given, count in (("br", 1), (tokens, 1), ([tokens, tokens], 2), (["br"], 1)):
        data = http.post("/v1/embeddings", json={"input": given, "pooling": "last", "normalize": False}).json()["data"]
        assert len(data) == count
        np.testing.assert_allclose(data[0]["embedding"], fake.embedding(tokens, "last"), rtol=1e-5)


def test_dimensions_are_cut_and_scaled_again(http: httpx.Client, fake: SimpleNamespace, ids: Callable[[str], list[int]]) -> None:
    [d] = http.post("/v1/embeddings", json={"input": "bread", "dimensions": 3, "encoding_format": "base64"}).json()["data"]
    vector = np.frombuffer(base64.b64decode(d["embedding"]), "<f4")
    np.testing.assert_allclose(vector, unit(fake.embedding(ids("bread"), "mean")[:3]), rtol=1e-5)


def test_concurrent_requests_share_steps(http: httpx.Client, fake: SimpleNamespace, ids: Callable[[str], list[int]]) -> None:
    """Alone, each would wait for a step of 0.1 s of its own."""
    texts = [f"text number {i}" for i in range(24)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda t: http.post("/v1/embeddings", json={"input": t}).json()["data"][0]["embedding"], texts))
    assert time.perf_counter() - begin < 1.8
    for text, answer in zip(texts, answers, strict=True):
        np.testing.assert_allclose(answer, unit(fake.embedding(ids(text), "mean")), rtol=1e-5)


def test_more_than_a_step_holds(http: httpx.Client, fake: SimpleNamespace) -> None:
    texts = [[i % 90 + 2] * (i % 50 + 1) for i in range(90)]  # 64 texts and 256 tokens fit
    data = http.post("/v1/embeddings", json={"input": texts}).json()["data"]
    for text, d in zip(texts, data, strict=True):
        np.testing.assert_allclose(d["embedding"], unit(fake.embedding(text, "mean")), rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"input": []}, 400, "at least one text"),
        ({"input": ""}, 400, "a text is empty"),
        ({"input": [[5], []]}, 400, "a text is empty"),
        ({"input": 5}, 400, "input: must be a text, token ids"),
        ({}, 400, "input"),
        ({"input": [[5, 1]]}, 400, "padding"),
        ({"input": [[5, 400]]}, 400, "token 400 is not in the vocabulary"),
        ({"input": "x" * 251}, 400, "has 251 tokens and fake takes 250"),
        ({"input": "x", "dimensions": 9}, 400, "dimensions is 9; fake has 8"),
        ({"input": "x", "dimensions": 0}, 400, "dimensions"),
        ({"input": "x", "pooling": "max"}, 400, "pooling"),
        ({"input": "x", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "x", "model": "other"}, 404, "is not served here"),
    ],
)
def test_what_is_refused(http: httpx.Client, body: dict[str, object], status: int, word: str) -> None:
    answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]


def test_a_long_text_may_be_cut(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={"input": ["x" * 251, "x"], "truncate": True}).json()
    assert answer["usage"]["prompt_tokens"] == 251


def test_an_encoder_generates_nothing(http: httpx.Client) -> None:
    for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": [{"role": "user", "content": "x"}]})):
        answer = http.post(f"/v1/{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_endpoint")
        assert "/v1/embeddings" in answer.json()["error"]["message"]


def test_a_decoder_makes_no_embeddings(server: SimpleNamespace) -> None:
    with server.http() as http:
        answer = http.post("/v1/embeddings", json={"input": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_endpoint")


def test_metrics_count_texts(http: httpx.Client) -> None:
    before = http.get("/metrics").text
    http.post("/v1/embeddings", json={"input": ["a", "b"]})
    count = lambda text: float(next(line for line in text.splitlines() if line.startswith("ingot_embedded_texts_total")).split()[1])
    assert count(http.get("/metrics").text) == count(before) + 2


def test_who_waits_is_told_that_the_engine_died(start: Callable[..., SimpleNamespace], encoder: Path, fake: SimpleNamespace) -> None:
    server = start("load_encoder", path=encoder)
    with server.http() as http:
        answer = http.post("/v1/embeddings", json={"input": [[fake.CRASH]]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "lost")
    assert server.wait() == 1
