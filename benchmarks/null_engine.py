"""An engine over an executor that computes nothing and takes a given time a step: what is left is what the host does.

    python benchmarks/null_engine.py FOLDER API_WORKERS     # serves it; `write_artifact` made the folder

The engine's process finds `load` here, and the time of a step in NULL_STEP_MS.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ingot.artifacts.artifact import ArtifactWriter
from ingot.artifacts.manifest import Group, ModelInfo, Options
from ingot.models.source import BUNDLED
from ingot.ops.target import host
from ingot.runtime.batch import Sampled, StepBatch, StepLayout, StepSize
from ingot.runtime.engine import Engine, EngineOptions
from ingot.runtime.kv_cache import GroupInfo
from ingot.runtime.protocol import ExecutorInfo
from ingot.runtime.tokenizer import Tokenizer
from ingot.serve.launch import EngineConfig, ServerConfig, run

STEP_MS = "NULL_STEP_MS"
NUM_SEQS, MAX_MODEL_LEN, PAGE_SIZE, NUM_PAGES = 256, 8192, 64, 16384


class Slept:
    """A step on its way. The device takes one after another."""

    def __init__(self, sampled: Sampled, ready: float) -> None:
        self._sampled, self._ready = sampled, ready

    def result(self) -> Sampled:
        left = self._ready - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return self._sampled


class NullExecutor:
    """Pads as captured decode steps are padded, from three buffers in turn, and says some tokens `seconds` after the step before."""

    def __init__(self, vocab_size: int, seconds: float = 0.0) -> None:
        self.info = ExecutorInfo({"full": GroupInfo("page", PAGE_SIZE, NUM_PAGES)}, NUM_SEQS, 8192, MAX_MODEL_LEN, vocab_size, 512, asynchronous=True)
        self._layout = StepLayout.of(self.info.groups, NUM_SEQS, MAX_MODEL_LEN)
        self._batches: dict[tuple[int, StepSize], StepBatch] = {}
        self._turn = 0
        self._tokens = np.random.default_rng(0).integers(300, vocab_size, 8192).astype(np.int32)
        self._seconds, self._ready = seconds, 0.0

    def batch(self, size: StepSize) -> StepBatch:
        self._turn = (self._turn + 1) % 3
        bucket = size.num_tokens if size.num_tokens != size.num_seqs else max(1 << (size.num_seqs - 1).bit_length(), 1)
        padded = size if bucket == size.num_tokens else StepSize(bucket, bucket, bucket, size.longest)
        key = (self._turn, padded)
        if key not in self._batches:
            self._batches[key] = StepBatch(self._layout, size, padded)
        self._batches[key].reset(size)
        return self._batches[key]

    def launch(self, batch: StepBatch) -> Slept:
        self._ready = max(self._ready, time.perf_counter()) + self._seconds
        first = self._turn * 997  # every step says something else
        return Slept(Sampled(self._tokens[first : first + batch.size.num_rows]), self._ready)


def engine(seconds: float = 0.0) -> Engine:
    """With the bundled model's tokenizer."""
    tokenizer = Tokenizer(BUNDLED)
    return Engine(NullExecutor(tokenizer.vocab_size, seconds), tokenizer, _model(tokenizer.vocab_size))


def load(path: str, options: EngineOptions, progress: Callable[[str, float], None]) -> Engine:
    """What the engine's process calls."""
    made = engine(float(os.environ[STEP_MS]) / 1e3)
    gc.freeze()  # as `load_engine` does
    return made


def write_artifact(folder: Path) -> None:
    """A manifest and a tokenizer, no weights."""
    writer = ArtifactWriter(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        writer.add_file(f"tokenizer/{name}", (BUNDLED / name).read_bytes())
    options = Options("float32", "none", "auto", NUM_SEQS, 8192, False, False)
    groups = (Group("full", "page", PAGE_SIZE, NUM_PAGES),)
    writer.finish(
        key="00" * 32, key_inputs={}, target=host(), model=_model(Tokenizer(BUNDLED).vocab_size), options=options, groups=groups, states=(), report={},
        entry_point="forward",
    )  # fmt: skip


def _model(vocab_size: int) -> ModelInfo:
    return ModelInfo("null", "Null", "null", vocab_size, MAX_MODEL_LEN, (0,), "float32", 0)


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    sys.exit(run(ServerConfig(EngineConfig(sys.argv[1], factory="null_engine:load"), port=0, api_workers=int(sys.argv[2]))))
