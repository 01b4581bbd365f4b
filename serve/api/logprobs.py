"""The engine's log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ingot.runtime.request import TokenLogprob

from ..protocol import chat
from ..protocol.completion import Logprobs
from ..service import Service


def completion_logprobs(service: Service, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None], offset: int) -> Logprobs:
    """For /v1/completions; `offset` is where the first token's text begins. An entry is None for a prompt's first token."""
    shown = Logprobs()
    for token_id, entry in zip(token_ids, entries, strict=True):
        text = _text(service, token_id)
        shown.tokens.append(text)
        shown.text_offset.append(offset)
        shown.token_logprobs.append(None if entry is None else entry.logprob)
        # The chosen token is listed even when it is not among the most probable ones.
        shown.top_logprobs.append(None if entry is None else {_text(service, i): p for i, p in entry.top} | {text: entry.logprob})
        offset += len(text)
    return shown


def chat_logprobs(service: Service, entries: Sequence[TokenLogprob]) -> chat.ChatLogprobs:
    """For /v1/chat/completions."""
    content = []
    for entry in entries:
        top = [chat.TopLogprob(**_token(service, i), logprob=p) for i, p in entry.top]
        content.append(chat.TokenLogprob(**_token(service, entry.token_id), logprob=entry.logprob, top_logprobs=top))
    return chat.ChatLogprobs(content=content)


def _token(service: Service, token_id: int) -> dict[str, Any]:
    return {"token": _text(service, token_id), "bytes": list(service.token_bytes(token_id))}


def _text(service: Service, token_id: int) -> str:
    return service.token_bytes(token_id).decode("utf-8", "replace")
