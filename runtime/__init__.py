"""The runtime: an artifact and requests become tokens."""

from .llm import LLM, Completion, RequestOutput
from .request import RequestError, SamplingParams

__all__ = ["LLM", "Completion", "RequestError", "RequestOutput", "SamplingParams"]
