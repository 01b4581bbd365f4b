"""/v1/chat/completions: request and response, as OpenAI documents them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from .sampling import MAX_LOGPROBS, SamplingRequest, one_of
from .usage import OptionalUsage, Usage


class TextPart(BaseModel):
    """A piece of a message's content; text is the only kind served."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of the conversation. Fields beyond OpenAI's (`reasoning_content`, …) reach the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Annotated[str | list[TextPart] | None, one_of("text, or a list of text parts")] = None

    @property
    def for_template(self) -> dict[str, Any]:
        """What a chat template reads: content as one string."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])
        return {**(self.model_extra or {}), "role": self.role, "content": content}


class ChatRequest(SamplingRequest):
    """`max_tokens` is the older name of `max_completion_tokens`; without either an answer may fill the context."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = SamplingRequest.unsupported | {
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "web_search_options": (None,),
        "continue_final_message": (None, False),
        "echo": (None, False),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class TopLogprob(BaseModel):
    """A token, its natural-log probability, and its bytes, which need not be text on their own."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The chosen token and the most probable ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[TokenLogprob]


class ChatMessage(BaseModel):
    """The answer, or in a stream the next piece of it, the role in the first alone."""

    role: Annotated[Literal["assistant"] | None, Field(exclude_if=lambda role: role is None)] = None
    content: Annotated[str | None, Field(exclude_if=lambda content: content is None)] = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatDelta(BaseModel):
    """The next piece of an answer."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None

    def extend(self, piece: ChatDelta) -> None:
        """Take in the next piece of the same answer."""
        self.delta.content = (self.delta.content or "") + (piece.delta.content or "")
        self.finish_reason = piece.finish_reason
        if self.logprobs is not None and piece.logprobs is not None:
            self.logprobs.content += piece.logprobs.content


class ChatCompletion(BaseModel):
    """The response."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(BaseModel):
    """One event of a stream; `usage` comes alone in the last."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: OptionalUsage = None
