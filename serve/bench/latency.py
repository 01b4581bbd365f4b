"""`ingot bench latency`: the time of a decode step by batch size, and of a prompt by length, through the public engine.

Prompts of 128 random ids, greedy. A step = (time for 8 + n new tokens − time for 8) / n, with n = 128, and 64 from batch 64 on.
A prompt = the time for its first token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ingot.artifacts.artifact import Artifact
from ingot.runtime.engine import EngineOptions
from ingot.runtime.llm import LLM
from ingot.runtime.load import load_engine
from ingot.runtime.request import SamplingParams

from .figure import about, beside
from .floor import Floor

PROMPT_TOKENS = 128
WARM_TOKENS = 8

Progress = Callable[[str, float], None]


def run(path: Path, batches: Sequence[int], prefills: Sequence[int], repeats: int, progress: Progress) -> dict[str, Any]:
    """Medians in milliseconds beside their floors; a point that the artifact has no room for says so in `skipped`."""
    artifact = Artifact.open(path)
    progress("measure the device", 0.0)
    floor = Floor.of(artifact)
    llm = LLM.over(load_engine(path, EngineOptions(enable_prefix_caching=False), progress))
    bench = _Bench(llm, repeats, floor)
    points = len(batches) + len(prefills)
    decode, prefill = [], []
    for i, batch in enumerate(batches):
        progress(f"decode, batch {batch}", i / points)
        decode.append(bench.decode(batch))
    for i, tokens in enumerate(prefills, len(batches)):
        progress(f"prefill, {tokens} tokens", i / points)
        prefill.append(bench.prefill(tokens))
    return {**about(artifact, floor), "decode": decode, "prefill": prefill}


class _Bench:
    def __init__(self, llm: LLM, repeats: int, floor: Floor) -> None:
        self._llm, self._repeats, self._floor = llm, repeats, floor
        self._random = np.random.default_rng(0)

    def decode(self, batch: int) -> dict[str, Any]:
        info = self._llm.engine.info
        count = 64 if batch >= 64 else 128
        length = PROMPT_TOKENS + WARM_TOKENS + count
        if batch > info.max_num_seqs:
            return {"batch": batch, "skipped": f"compiled for at most {info.max_num_seqs} sequences (--max-num-seqs)"}
        if length > self._llm.engine.max_model_len:
            return {"batch": batch, "skipped": f"needs a context of {length}, there is one of {self._llm.engine.max_model_len}"}
        self._seconds(batch, PROMPT_TOKENS, WARM_TOKENS)
        steps = []
        for _ in range(self._repeats):
            short = self._seconds(batch, PROMPT_TOKENS, WARM_TOKENS)
            steps.append((self._seconds(batch, PROMPT_TOKENS, WARM_TOKENS + count) - short) / count)
        seconds = statistics.median(steps)
        bound = self._floor.decode(batch, PROMPT_TOKENS + WARM_TOKENS + count // 2)
        return {"batch": batch, **beside(seconds, bound), "tokens_per_second": batch / seconds}

    def prefill(self, tokens: int) -> dict[str, Any]:
        if tokens >= self._llm.engine.max_model_len:
            return {"tokens": tokens, "skipped": f"the context is {self._llm.engine.max_model_len}"}
        self._seconds(1, tokens, 1)
        seconds = statistics.median(self._seconds(1, tokens, 1) for _ in range(self._repeats))
        return {"tokens": tokens, **beside(seconds, self._floor.prefill(tokens)), "tokens_per_second": tokens / seconds}

    def _seconds(self, batch: int, prompt_tokens: int, new_tokens: int) -> float:
        prompts = self._random.integers(0, self._llm.engine.info.vocab_size, (batch, prompt_tokens)).tolist()
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        begin = time.perf_counter()
        self._llm.generate(prompts, params)
        return time.perf_counter() - begin
