"""An artifact becomes an engine: checked, planned, loaded."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.files import ArtifactError, read
from ingot.artifacts.gate_record import refuse_failed
from ingot.artifacts.manifest import MANIFEST, decode
from ingot.artifacts.settings import settings
from ingot.ops.garbage import uncollected
from ingot.ops.target import check_runs_here

from .embedder import Embedder
from .engine import Engine, EngineOptions
from .executor import Executor, Progress
from .memory import plan_memory
from .tokenizer import Tokenizer


def load_served(path: Path | str, options: EngineOptions, progress: Progress = lambda stage, done: None) -> Engine | Embedder:
    """What serves the artifact at `path`: an engine, or an encoder's embedder. Raises what either does."""
    manifest = Path(path) / MANIFEST
    if manifest.is_file() and decode(read(manifest), manifest).entry_point == "embed":  # the artifact is checked by what loads it
        return Embedder(path, max_model_len=options.max_model_len, num_threads=options.num_threads, progress=progress)
    return load_engine(path, options, progress)


@uncollected()
def load_engine(path: Path | str, options: EngineOptions, progress: Progress = lambda stage, done: None) -> Engine:
    """Open the artifact at `path` and make it ready: nothing is compiled, captured or allocated after this returns.

    Raises ArtifactError (damaged), TargetError (made for another machine), GateError (its kernels failed) and MemoryPlanError
    (does not fit) before weights are read.
    """
    start = time.perf_counter()
    progress("check the artifact", 0.0)
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    if manifest.entry_point != "forward":
        raise ArtifactError(f"{artifact.root} holds {manifest.model.architecture}, an encoder, which generates nothing; use Embedder, or `ingot embed`")
    check_runs_here(manifest.target, f"ingot compile {manifest.model.name} --target auto")
    if manifest.target.kind == "cpu":
        torch.set_num_threads(options.num_threads or settings().num_threads)
    refuse_failed(artifact)
    plans = {name: artifact.plan(name) for name in manifest.variants}
    progress("plan memory", 0.0)  # and wait for the GPU's context
    memory = plan_memory(
        artifact,
        plans.values(),
        max_model_len=options.max_model_len,
        utilization=options.gpu_memory_utilization,
        num_pages=options.num_pages,
    )
    with ThreadPoolExecutor(1) as pool:  # a tokenizer of a large vocabulary takes as long as the weights
        tokenizing = pool.submit(Tokenizer, artifact.root / "tokenizer") if "tokenizer/tokenizer.json" in manifest.files else None
        progress("load kernels", 0.0)
        executor = Executor(artifact, plans, memory, progress)
        tokenizer = None if tokenizing is None else tokenizing.result()
    engine = Engine(executor, tokenizer, manifest.model, enable_prefix_caching=options.enable_prefix_caching,
                    max_num_batched_tokens=options.max_num_batched_tokens, overlap=options.overlap)  # fmt: skip
    gc.freeze()  # what was loaded stays: no collection between two steps need look at it
    if why := engine.stats().prefix_caching_off:
        progress(f"prefix caching is off: {why}", 1.0)
    progress(f"ready in {time.perf_counter() - start:.1f} s", 1.0)
    return engine
