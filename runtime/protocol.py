"""What an engine and an executor are to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from .batch import Sampled, StepBatch, StepSize
from .kv_cache import GroupInfo


@dataclass(frozen=True)
class ExecutorInfo:
    """What an executor can take. `groups` by name, in the order of the manifest."""

    groups: Mapping[str, GroupInfo]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    max_num_rows: int = 0  # rows of logits of a step; 0: as many as tokens
    asynchronous: bool = False  # `launch` returns before the step is computed


class InFlight(Protocol):
    """A step that was launched."""

    def result(self) -> Sampled:
        """Wait for this step alone: numpy arrays, for the batch's R rows. IngotError when nothing of it can be trusted."""
        ...


class Executor(Protocol):
    """Runs steps, in the order of their launches: here, on another device, or in a group of workers to whom the batch's buffer is sent."""

    @property
    def info(self) -> ExecutorInfo: ...

    def batch(self, size: StepSize) -> StepBatch:
        """Where the next step is to be packed, padded to a size that the executor computes; launched, or given up, before the next call."""
        ...

    def launch(self, batch: StepBatch) -> InFlight:
        """Enqueue a step; with an asynchronous executor it waits for nothing. IngotError when it cannot be computed."""
        ...
