"""`ingot bench throughput`: a mixed load, all at once: 256 requests, prompt and output lengths uniform in 100…1024, temperature 0.6."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ingot.artifacts.artifact import Artifact
from ingot.ops.errors import IngotError
from ingot.runtime.engine import EngineOptions
from ingot.runtime.llm import LLM
from ingot.runtime.load import load_engine
from ingot.runtime.request import SamplingParams

from .figure import about
from .floor import Floor


class LoadTooLong(IngotError):
    """The requests do not fit the context."""


def run(path: Path, requests: int, shortest: int, longest: int, seed: int, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Output tokens per second beside their floor, and what the load was. Raises LoadTooLong."""
    artifact = Artifact.open(path)
    progress("measure the device", 0.0)
    floor = Floor.of(artifact)
    llm = LLM.over(load_engine(path, EngineOptions(enable_prefix_caching=False), progress))
    context = llm.engine.max_model_len
    if 2 * longest > context:
        raise LoadTooLong(f"prompts and answers of up to {longest} tokens need a context of {2 * longest}, there is one of {context}; lower --longest")
    random = np.random.default_rng(seed)
    lengths = random.integers(shortest, longest, (requests, 2), endpoint=True)
    prompts = [random.integers(0, llm.engine.info.vocab_size, int(n)).tolist() for n, _ in lengths]
    params = [SamplingParams(max_tokens=int(n), temperature=0.6, ignore_eos=True, seed=seed + i) for i, (_, n) in enumerate(lengths)]
    llm.generate(prompts[0], SamplingParams(max_tokens=8, temperature=0.6, ignore_eos=True))  # the first step of a process is no step
    begin = time.perf_counter()
    llm.generate(prompts, params, progress=lambda done, of: progress("mixed load", done / of))
    seconds = time.perf_counter() - begin
    prompt_tokens, output_tokens = map(int, lengths.sum(0))
    bound = floor.load(*lengths.T.tolist())
    return {
        **about(artifact, floor),
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "seconds": seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "floor_output_tokens_per_second": output_tokens / bound,
        "fraction_of_floor": bound / seconds,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / seconds,
    }
