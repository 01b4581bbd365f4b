"""What a decode step costs on the host, over an executor that computes nothing: scheduling, packing, deltas with text. Prints JSON.

    python benchmarks/host_step.py [--batch 1,64,256] [--steps 300] [--profile]

Microseconds, medians: the whole of `Engine.step`, and of that `schedule`, `pack` (with the batch's buffer) and `deltas`. What a device
adds is measured by step_profile.py.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import null_engine
import numpy as np

from ingot.runtime import engine as engine_module
from ingot.runtime.request import Request, SamplingParams

PROMPT = 128


def timed(times: dict[str, list[float]], name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        begin = time.perf_counter()
        result = fn(*args)
        times.setdefault(name, []).append(time.perf_counter() - begin)
        return result

    return run


def measure(batch: int, steps: int, profiled: bool) -> dict[str, Any]:
    engine = null_engine.engine()
    rng = np.random.default_rng(0)
    for i in range(batch):
        prompt = rng.integers(0, engine.vocab_size, PROMPT).tolist()
        engine.add(Request(f"r{i}", prompt, SamplingParams(max_tokens=steps + 100, temperature=0.6, ignore_eos=True, seed=i)))
    for _ in range(20):
        engine.step()
    times: dict[str, list[float]] = {}
    pack = engine_module.pack
    engine.scheduler.schedule = timed(times, "schedule", engine.scheduler.schedule)  # type: ignore[method-assign]
    engine.executor.batch = timed(times, "batch", engine.executor.batch)  # type: ignore[method-assign]
    engine._deltas = timed(times, "deltas", engine._deltas)  # type: ignore[method-assign]
    engine_module.pack = timed(times, "pack", pack)  # type: ignore[assignment]
    step = timed(times, "step", engine.step)
    profiler = cProfile.Profile()
    gc.collect()
    gc.freeze()
    if profiled:
        profiler.enable()
    for _ in range(steps):
        step()
    if profiled:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(18)
    engine_module.pack = pack
    return {"batch": batch} | {f"{name}_us": round(statistics.median(t) * 1e6, 1) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,64,256")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="where Python spends it, on stdout; the times are then much too long")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    points = [measure(int(b), args.steps, args.profile) for b in args.batch.split(",")]
    print(json.dumps(points))
    if args.output is not None:
        args.output.write_text(json.dumps({"points": points}) + "\n")


if __name__ == "__main__":
    main()
