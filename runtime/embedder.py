"""`Embedder`: texts in, embeddings out, in this process. Whole texts are packed into steps; nothing is cached between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.files import ArtifactError
from ingot.artifacts.gate_record import refuse_failed
from ingot.artifacts.manifest import POOLINGS
from ingot.ops.target import check_runs_here

from .request import RequestError
from .tokenizer import Tokenizer

Text: TypeAlias = str | list[int]


class Embedder:
    """An encoder's artifact, loaded and ready. IngotError when it cannot be: not an encoder's, not for this machine, damaged."""

    def __init__(self, artifact_path: str | Path, *, num_threads: int | None = None, progress: Callable[[str, float], None] = lambda stage, done: None) -> None:
        from .embed_executor import EmbedExecutor  # here: it imports torch

        artifact = Artifact.open(artifact_path)
        manifest = artifact.manifest
        if manifest.embedding is None:
            raise ArtifactError(f"{artifact.root} holds {manifest.model.architecture}, which generates and makes no embeddings; use LLM, or `ingot generate`")
        check_runs_here(manifest.target, f"ingot compile {manifest.model.name} --target auto")
        refuse_failed(artifact)
        self.info, self.model = manifest.embedding, manifest.model
        self.max_num_seqs, self.max_num_batched_tokens = manifest.options.max_num_seqs, manifest.options.max_num_batched_tokens
        self.tokenizer = Tokenizer(artifact.root / "tokenizer") if "tokenizer/tokenizer.json" in manifest.files else None
        self._executor = EmbedExecutor(artifact, num_threads, progress)

    def embed(self, texts: Text | Sequence[Text], *, pooling: str | None = None, normalize: bool | None = None, truncate: bool = False) -> np.ndarray:
        """Embeddings, float32 [n, D], of texts (strings or token ids, special tokens included), in their order.

        `pooling` ("mean", "cls", "last") and `normalize` (to length 1) default to what the artifact records. A text of more
        tokens than the model takes is a RequestError, or with `truncate` loses its end but keeps its closing special tokens.
        """
        single = isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], int))
        listed: list[Text] = [texts] if single else list(texts)  # type: ignore[list-item, arg-type]
        ids = [self.encode(t, truncate=truncate) for t in listed]
        vectors = self.embed_ids(ids, [self.pooling_index(pooling)] * len(ids))
        return unit(vectors) if (self.info.normalize if normalize is None else normalize) else vectors

    def encode(self, text: Text, *, truncate: bool = False) -> list[int]:
        """A text's token ids, checked."""
        if isinstance(text, str):
            if self.tokenizer is None:
                raise RequestError("texts: the artifact has no tokenizer; give token ids")
            ids = self.tokenizer.encode(text, max_length=self.model.max_model_len if truncate else None)
        else:
            ids = list(text[: self.model.max_model_len]) if truncate else list(text)
        check_text(ids, self.model.max_model_len, self.model.vocab_size, self.info.padding_id)
        return ids

    def pooling_index(self, pooling: str | None) -> int:
        """What the step input `pooling` says. RequestError for an unknown one."""
        pooling = self.info.pooling if pooling is None else pooling
        if pooling not in POOLINGS:
            raise RequestError(f"pooling is {pooling!r}; use {', '.join(POOLINGS)}")
        return POOLINGS.index(pooling)

    def embed_ids(self, texts: Sequence[list[int]], poolings: Sequence[int]) -> np.ndarray:
        """Embeddings, not normalized, of checked token ids [n, D]; as many texts a step as fit in it. RequestError when one is not finite."""
        vectors = np.empty((len(texts), self.info.dimensions), np.float32)
        for step in batches([len(t) for t in texts], self.max_num_batched_tokens, self.max_num_seqs):
            vectors[step] = self._executor.step([texts[i] for i in step], [poolings[i] for i in step])
        if not np.isfinite(vectors).all():
            raise RequestError("an embedding is not finite: the model's weights or kernels are damaged")
        return vectors


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
