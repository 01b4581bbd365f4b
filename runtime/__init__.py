"""The runtime: an artifact and requests become tokens."""

from .embedder import Embedder
from .llm import LLM, Completion, RequestOutput
from .request import RequestError, SamplingParams

__all__ = ["LLM", "Completion", "Embedder", "RequestError", "RequestOutput", "SamplingParams"]
