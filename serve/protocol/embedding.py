"""/v1/embeddings: request and response, as OpenAI documents them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from .body import RequestBody
from .sampling import Token, one_of

MAX_TEXTS = 2048
"""OpenAI's limit of one request."""


class EmbeddingRequest(RequestBody):
    """`input` is one text or several, each a string or token ids (special tokens included).

    `dimensions`: the first so many, scaled to length 1 again, as OpenAI does; meant for models that were trained to be cut.
    Beyond OpenAI's fields: `pooling`, `normalize`, and `truncate`, without which a text that is too long is an error.
    """

    model: str | None = None
    input: Annotated[
        str | list[Token] | Annotated[list[str], Field(max_length=MAX_TEXTS)] | Annotated[list[list[Token]], Field(max_length=MAX_TEXTS)],
        one_of(f"a text, token ids, or a list of at most {MAX_TEXTS} of either"),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Literal["mean", "cls", "last"] | None = None
    normalize: bool | None = None
    truncate: bool = False

    @property
    def texts(self) -> list[str | list[int]]:
        """`input` as a list."""
        single = isinstance(self.input, str) or (bool(self.input) and isinstance(self.input[0], int))
        return [self.input] if single else list(self.input)  # type: ignore[list-item, arg-type]


class EmbeddingObject(BaseModel):
    """One vector: numbers, or with base64 their float32 bytes, little-endian."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The response."""

    object: Literal["list"] = "list"
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage
