"""A real engine over an executor that needs no model: the next token follows from the last one and its position alone.

Imported by the server's engine process through PYTHONPATH, and by the tests to know what it must answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import torch

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.manifest import POOLINGS
from ingot.ops.errors import IngotError
from ingot.runtime.batch import Sampled, StepBatch, StepLayout, StepSize
from ingot.runtime.embedder import Embedder
from ingot.runtime.engine import Engine, EngineOptions
from ingot.runtime.kv_cache import GroupInfo
from ingot.runtime.protocol import ExecutorInfo
from ingot.runtime.sampler import Sampler
from ingot.runtime.tokenizer import Tokenizer

VOCAB = 263  # 256 bytes, three special tokens, four ids that no token has
EOS = 256
CRASH = 262  # a prompt with it kills the engine's process
NUM_PAGES, PAGE_SIZE, MAX_MODEL_LEN = 512, 4, 300
_TABLE = np.random.default_rng(3).normal(0, 3, VOCAB).astype(np.float32)
_TABLE[_TABLE.argmax()] += 1  # greedy steps are not ties


def logits(token: int, position: int) -> np.ndarray:
    """Of the token after `token` at `position`; ids without a token are never the most probable."""
    row = np.roll(_TABLE, 7 * token + 3 * position)
    row[EOS:] = -9.0
    return row


def greedy(prompt: list[int], count: int) -> list[int]:
    """The continuation."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(tokens[-1], len(tokens) - 1).argmax()))
    return tokens[len(prompt) :]


def logprob(token: int, position: int, chosen: int) -> float:
    """Natural-log probability of `chosen` after `token` at `position`."""
    return float(torch.log_softmax(torch.from_numpy(logits(token, position)).double(), -1)[chosen])


class Roll:
    """A step on its way. The device takes one after another, each for `seconds`."""

    def __init__(self, sampled: Sampled, ready: float) -> None:
        self.sampled, self.ready = sampled, ready

    def result(self) -> Sampled:
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return self.sampled


class RollExecutor:
    """Steps take `seconds`, as those of a model would, and are computed beside the engine."""

    def __init__(self, max_model_len: int, seconds: float) -> None:
        self.info = ExecutorInfo({"full": GroupInfo("page", PAGE_SIZE, NUM_PAGES)}, 64, 256, max_model_len, VOCAB, asynchronous=True)
        self._layout = StepLayout.of(self.info.groups, 64, max_model_len)
        self._samples = np.zeros(self._layout.num_samples, np.int32)
        self._sampler = Sampler(64, 256, VOCAB, torch.device("cpu"))
        self._seconds, self._ready = seconds, 0.0

    def batch(self, size: StepSize) -> StepBatch:
        return StepBatch(self._layout, size)

    def launch(self, batch: StepBatch) -> Roll:
        ids = batch.input_ids(self._samples)
        if (ids == CRASH).any():
            os._exit(3)
        values = np.zeros((batch.size.num_rows, VOCAB), np.float32)
        for row, t in enumerate(batch.arrays["logits_rows"]):
            values[row] = logits(int(ids[t]), int(batch.arrays["positions"][t]))
        sampled = self._sampler(torch.from_numpy(values), batch, torch.from_numpy(ids)).to_host()
        kept = sampled.token_ids[: len(self._samples)]
        self._samples[: len(kept)] = np.maximum(kept, 0)
        self._ready = max(self._ready, time.perf_counter()) + self._seconds
        return Roll(sampled, self._ready)


def embedding(ids: list[int], pooling: str) -> np.ndarray:
    """What the fake encoder says of a text, before it is normalized."""
    rows = np.stack([np.random.default_rng(i).normal(0, 1, 8) for i in ids]).astype(np.float32)
    return {"mean": rows.mean(0), "cls": rows[0], "last": rows[-1]}[pooling]


class RowsExecutor:
    """The embedder's: a step takes `seconds`, however many texts it has."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def step(self, texts: list[list[int]], poolings: list[int]) -> np.ndarray:
        if any(CRASH in t for t in texts):
            os._exit(3)
        time.sleep(self._seconds)
        return np.stack([embedding(t, POOLINGS[p]) for t, p in zip(texts, poolings, strict=True)])


def load_encoder(path: str, options: EngineOptions, progress: Progress) -> Embedder:
    return Embedder.over(RowsExecutor(0.1), Artifact.open(path))


Progress = Callable[[str, float], None]


def load(path: str, options: EngineOptions, progress: Progress, seconds: float = 0.0) -> Engine:
    artifact = Artifact.open(path)
    progress("load weights", 0.5)
    tokenizer = Tokenizer(artifact.root / "tokenizer") if "tokenizer/tokenizer.json" in artifact.manifest.files else None
    return Engine(RollExecutor(options.max_model_len or MAX_MODEL_LEN, seconds), tokenizer, artifact.manifest.model)


def load_slow_steps(path: str, options: EngineOptions, progress: Progress) -> Engine:
    return load(path, options, progress, seconds=0.02)


def load_slowly(path: str, options: EngineOptions, progress: Progress) -> Engine:
    progress("load weights", 0.25)
    time.sleep(1.5)
    return load(path, options, progress)


def load_nothing(path: str, options: EngineOptions, progress: Progress) -> Engine:
    raise IngotError("the model needs 3 GB more than there are; lower --max-model-len")
