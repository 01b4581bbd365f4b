"""`Embedder`: texts in, embeddings out, in this process. Whole texts are packed into steps; nothing is cached between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.files import ArtifactError
from ingot.artifacts.gate_record import refuse_failed
from ingot.artifacts.manifest import POOLINGS
from ingot.ops.errors import IngotError
from ingot.ops.target import check_runs_here

from .request import RequestError
from .tokenizer import Tokenizer

Text: TypeAlias = str | list[int]


class Executor(Protocol):
    """Runs steps, here or on another device."""

    def step(self, texts: Sequence[list[int]], poolings: Sequence[int]) -> np.ndarray:
        """Embeddings, float32 [n, D], of texts that fit into one step."""
        ...


class NotFiniteError(IngotError):
    """The model computed something that is no number."""


class Embedder:
    """An encoder's artifact, loaded and ready. IngotError when it cannot be: not an encoder's, not for this machine, damaged."""

    def __init__(self, artifact_path: str | Path, *, max_model_len: int | None = None, num_threads: int | None = None,
                 progress: Callable[[str, float], None] = lambda stage, done: None) -> None:  # fmt: skip
        from .embed_executor import EmbedExecutor  # here: it imports torch, and `Embedder.over` does without

        artifact = Artifact.open(artifact_path)
        manifest = artifact.manifest
        if manifest.embedding is None:
            raise ArtifactError(f"{artifact.root} holds {manifest.model.architecture}, which generates and makes no embeddings; use LLM, or `ingot generate`")
        check_runs_here(manifest.target, f"ingot compile {manifest.model.name} --target auto")
        refuse_failed(artifact)
        self._serve(EmbedExecutor(artifact, num_threads, progress), artifact, max_model_len)

    @classmethod
    def over(cls, executor: Executor, artifact: Artifact) -> Embedder:
        """An embedder over an executor that exists already; the artifact says what it makes and has the tokenizer."""
        embedder = cls.__new__(cls)
        embedder._serve(executor, artifact, None)
        return embedder

    def _serve(self, executor: Executor, artifact: Artifact, max_model_len: int | None) -> None:
        manifest = artifact.manifest
        assert manifest.embedding is not None
        self.info, self.model = manifest.embedding, manifest.model
        self.max_model_len = self.model.max_model_len if max_model_len is None else max_model_len
        if not 1 <= self.max_model_len <= self.model.max_model_len:
            raise RequestError(f"max_model_len is {max_model_len}; {self.model.name} takes texts of 1 to {self.model.max_model_len} tokens")
        self.max_num_seqs, self.max_num_batched_tokens = manifest.options.max_num_seqs, manifest.options.max_num_batched_tokens
        self.tokenizer = Tokenizer(artifact.root / "tokenizer") if "tokenizer/tokenizer.json" in manifest.files else None
        self._executor = executor

    def embed(self, texts: Text | Sequence[Text], *, pooling: str | None = None, normalize: bool | None = None, truncate: bool = False) -> np.ndarray:
        """Embeddings, float32 [n, D], of texts (strings or token ids, special tokens included), in their order.

        `pooling` ("mean", "cls", "last") and `normalize` (to length 1) default to what the artifact records. A text of more
        tokens than the model takes is a RequestError, or with `truncate` loses its end but keeps its closing special tokens.
        """
        single = isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], int))
        listed: list[Text] = [texts] if single else list(texts)  # type: ignore[list-item, arg-type]
        ids = [self.encode(t, truncate=truncate) for t in listed]
        how = self.pooling_index(pooling)
        vectors = np.empty((len(ids), self.info.dimensions), np.float32)
        for step in batches([len(t) for t in ids], self.max_num_batched_tokens, self.max_num_seqs):
            vectors[step] = self.step([ids[i] for i in step], [how] * len(step))
        return unit(vectors) if (self.info.normalize if normalize is None else normalize) else vectors

    def encode(self, text: Text, *, truncate: bool = False) -> list[int]:
        """A text's token ids, checked."""
        if isinstance(text, str):
            if self.tokenizer is None:
                raise RequestError("texts: the artifact has no tokenizer; give token ids")
            ids = self.tokenizer.encode(text, max_length=self.max_model_len if truncate else None)
        else:
            ids = list(text[: self.max_model_len]) if truncate else list(text)
        check_text(ids, self.max_model_len, self.model.vocab_size, self.info.padding_id)
        return ids

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    def pooling_index(self, pooling: str | None) -> int:
        """What the step input `pooling` says."""
        return pooling_index(self.info.pooling if pooling is None else pooling)

    def step(self, texts: Sequence[list[int]], poolings: Sequence[int]) -> np.ndarray:
        """Embeddings, not normalized, [n, D] of checked texts that fit into one step. NotFiniteError when one is not finite."""
        vectors = self._executor.step(texts, poolings)
        if not np.isfinite(vectors).all():
            raise NotFiniteError(f"an embedding by {self.model.name} is not finite: its weights or kernels are damaged; compile the model again")
        return vectors


def pooling_index(pooling: str) -> int:
    """Place of `pooling` among POOLINGS. RequestError for an unknown one."""
    if pooling not in POOLINGS:
        raise RequestError(f"pooling is {pooling!r}; use {', '.join(POOLINGS)}")
    return POOLINGS.index(pooling)


def check_text(ids: Sequence[int], max_model_len: int, vocab_size: int, padding_id: int) -> None:
    """RequestError when these token ids are no text that the model can take."""
    if not ids:
        raise RequestError("a text is empty: it needs at least one token")
    if len(ids) > max_model_len:
        raise RequestError(f"a text has {len(ids)} tokens and the model takes {max_model_len}; shorten it, or ask for it to be truncated")
    wrong = next((t for t in ids if not 0 <= t < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"token {wrong} is not in the vocabulary of {vocab_size}")
    if padding_id in ids:
        raise RequestError(f"a text contains token {padding_id}, the model's padding, which has no position; leave it out")


def batches(lengths: Sequence[int], max_tokens: int, max_seqs: int) -> Iterator[list[int]]:
    """Consecutive indices of texts that fit into a step together."""
    step: list[int] = []
    tokens = 0
    for i, length in enumerate(lengths):
        if step and (tokens + length > max_tokens or len(step) == max_seqs):
            yield step
            step, tokens = [], 0
        step.append(i)
        tokens += length
    if step:
        yield step


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = vectors / np.where(lengths == 0, 1, lengths)
    return scaled
