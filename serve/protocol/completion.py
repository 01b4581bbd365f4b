"""/v1/completions: request and response, as OpenAI documents them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from .sampling import MAX_LOGPROBS, SamplingRequest, Token, one_of
from .usage import OptionalUsage


class CompletionRequest(SamplingRequest):
    """`prompt` is one or several, each text or token ids; the choices of prompt i are numbers i·n … i·n + n − 1."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = SamplingRequest.unsupported | {"suffix": (None, ""), "prompt_embeds": (None,)}

    prompt: Annotated[str | list[Token] | list[str] | list[list[Token]], one_of("text, token ids, or a list of either")]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None  # the most probable tokens to list beside the chosen one
    echo: bool | None = None
    return_token_ids: bool = False  # beyond OpenAI: choices carry token_ids


class Logprobs(BaseModel):
    """Parallel lists over the tokens of a choice; the first token of an echoed prompt has no probability: null."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    def extend(self, piece: Logprobs) -> None:
        """Take in the next tokens."""
        self.tokens += piece.tokens
        self.token_logprobs += piece.token_logprobs
        self.top_logprobs += piece.top_logprobs
        self.text_offset += piece.text_offset


class Choice(BaseModel):
    """One answer, or in a stream the next piece of one."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    token_ids: Annotated[list[int] | None, Field(exclude_if=lambda ids: ids is None)] = None

    def extend(self, piece: Choice) -> None:
        """Take in the next piece of the same answer."""
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        if self.token_ids is not None:
            self.token_ids += piece.token_ids or []
        if self.logprobs is not None and piece.logprobs is not None:
            self.logprobs.extend(piece.logprobs)


class Completion(BaseModel):
    """The response; a stream sends it in pieces, `usage` alone in the last."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: OptionalUsage = None
