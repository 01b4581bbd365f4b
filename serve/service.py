"""What every endpoint needs: the engine, the model, its tokenizer, and whether requests are taken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.manifest import Embedding, ModelInfo
from ingot.runtime.request import SamplingParams
from ingot.runtime.tokenizer import Tokenizer

from .client import EngineClient, Generation
from .messages import Ready
from .metrics import Metrics
from .protocol.errors import ApiError

_LONG_TEXT = 20_000
"""Characters from which on a text is tokenized in a thread, so that other requests' tokens do not wait for it."""


@dataclass
class Service:
    """One served model."""

    client: EngineClient
    metrics: Metrics
    model: ModelInfo
    tokenizer: Tokenizer | None
    api_key: str | None
    embedding: Embedding | None = None  # how an encoder's embeddings are made; None for a model that generates
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def open(cls, artifact: Path, client: EngineClient, metrics: Metrics, api_key: str | None) -> Service:
        """Read from the artifact what the server itself needs. Raises ArtifactError and TokenizerError."""
        opened = Artifact.open(artifact)
        folder = opened.root / "tokenizer"
        tokenizer = Tokenizer(folder) if "tokenizer/tokenizer.json" in opened.manifest.files else None
        return cls(client, metrics, opened.manifest.model, tokenizer, api_key, opened.manifest.embedding)

    @property
    def state(self) -> str:
        """`ready`, or why requests are answered with 503: `loading`, `draining`, `lost`."""
        if self.client.lost.done():
            return "lost"
        if self.draining:
            return "draining"
        return "ready" if self.client.ready.done() else "loading"

    def engine(self) -> Ready:
        """What the engine said when it was ready. ApiError 503 when it is not."""
        if self.state != "ready":
            reasons = {"loading": "the model is loading", "draining": "the server is stopping", "lost": "the engine has died"}
            raise ApiError(503, reasons[self.state], code=self.state)
        return self.client.ready.result()

    def check_model(self, name: str | None) -> None:
        """ApiError 404 unless `name` is what is served here, or None."""
        if name is not None and name != self.model.name:
            raise ApiError(404, f"the model {name!r} is not served here; {self.model.name!r} is", param="model", code="model_not_found")

    def check_generates(self) -> None:
        """ApiError 400 when what is served is an encoder."""
        if self.embedding is not None:
            raise ApiError(400, f"{self.model.name} is an encoder and generates nothing; ask /v1/embeddings", code="unsupported_endpoint")

    def check_embeds(self) -> Embedding:
        """How embeddings are made. ApiError 400 when what is served is no encoder."""
        if self.embedding is None:
            raise ApiError(400, f"{self.model.name} generates text and makes no embeddings; ask /v1/completions", code="unsupported_endpoint")
        return self.embedding

    async def encode(self, text: str, *, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """Token ids of `text`, the first `max_length` at most. ApiError 400 without a tokenizer."""
        if self.tokenizer is None:
            raise ApiError(400, "the artifact has no tokenizer: give token ids", param="prompt", code="no_tokenizer")
        if len(text) < _LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens, max_length)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens, max_length)

    def decode(self, token_ids: list[int]) -> str:
        """The text of a prompt; "" without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids, skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, special ones by name; without a tokenizer, its number."""
        if self.tokenizer is None:
            return f"token_id:{token_id}".encode()
        return self.tokenizer.token_bytes(token_id, skip_special_tokens=False)

    def fit(self, prompts: Sequence[list[int]], max_tokens: int | None, *, explicit: bool) -> int | None:
        """`max_tokens`, or if that was not the client's wish, what the context leaves of it.

        ApiError 400 when a prompt is empty, too long or not of the vocabulary, or an explicit `max_tokens` goes beyond the context.
        """
        engine = self.engine()
        for prompt in prompts:
            if not prompt:
                raise ApiError(400, "the prompt is empty: it needs at least one token", param="prompt", code="invalid_value")
            if len(prompt) >= engine.max_model_len:
                raise _too_long(f"the prompt has {len(prompt)} tokens", engine.max_model_len)
            if max(prompt) >= engine.vocab_size:
                raise ApiError(400, f"token {max(prompt)} is not in the vocabulary of {engine.vocab_size}", param="prompt", code="invalid_value")
        longest = max(map(len, prompts))
        if max_tokens is None:
            return None
        if explicit and longest + max_tokens > engine.max_model_len:
            raise _too_long(f"{longest} prompt tokens and {max_tokens} to generate make {longest + max_tokens}", engine.max_model_len)
        return min(max_tokens, engine.max_model_len - longest)

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams, priority: int = 0) -> Generation:
        """Ask the engine. ApiError 503 when it stopped taking requests since."""
        self.engine()
        return self.client.generate(prompts, params, priority)


def _too_long(what: str, max_model_len: int) -> ApiError:
    """OpenAI's error for what exceeds the context."""
    return ApiError(400, f"{what}, and this server's context is {max_model_len}; shorten it", param="prompt", code="context_length_exceeded")
