"""Token counts of an answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field


class PromptTokensDetails(BaseModel):
    """`cached_tokens`: prompt tokens whose KV was found in the prefix cache."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """OpenAI's `usage`; each prompt counts once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


OptionalUsage = Annotated[Usage | None, Field(exclude_if=lambda usage: usage is None)]
"""Absent, not null, from the pieces of a stream that do not carry it."""
