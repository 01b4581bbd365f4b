"""What a decode step costs on the host, over an executor that computes nothing: scheduling, packing, deltas with text. Prints JSON.

    python benchmarks/host_step.py [--batch 1,64,256] [--steps 300] [--api-workers 4] [--profile]

Microseconds of CPU time, medians: the whole of `Engine.step`, and of that `schedule`, `pack` (with the batch's buffer) and `deltas`; beside it `tell`,
what a server's engine then does: its deltas as messages to the API processes. What a device adds is measured by step_profile.py.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import multiprocessing
import pstats
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import null_engine
import numpy as np

from ingot.runtime import engine as engine_module
from ingot.runtime.request import Request, SamplingParams
from ingot.serve.connection import Clients, Connection
from ingot.serve.engine_process import tell

PROMPT = 128


def timed(times: dict[str, list[float]], name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        begin = time.thread_time()
        result = fn(*args)
        times.setdefault(name, []).append(time.thread_time() - begin)
        return result

    return run


def listeners(count: int) -> Clients:
    """Sockets whose other ends another process reads."""
    pairs = [socket.socketpair() for _ in range(count)]
    fork = multiprocessing.get_context("fork")
    for _, theirs in pairs:
        fork.Process(target=drain, args=(theirs,), daemon=True).start()
    return Clients([Connection(ours) for ours, _ in pairs])


def drain(sock: socket.socket) -> None:
    while sock.recv(1 << 20):
        pass


def measure(batch: int, steps: int, api_workers: int, profiled: bool) -> dict[str, Any]:
    engine, clients = null_engine.engine(), listeners(api_workers)
    rng = np.random.default_rng(0)
    for i in range(batch):
        clients.owners[f"r{i}"] = clients.everybody()[i % api_workers]
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
    step, told = timed(times, "step", engine.step), timed(times, "tell", tell)
    profiler = cProfile.Profile()
    gc.collect()
    gc.freeze()
    if profiled:
        profiler.enable()
    for _ in range(steps):
        told(engine, clients, step(), False)
    if profiled:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(18)
    engine_module.pack = pack
    return {"batch": batch} | {f"{name}_us": round(statistics.median(t) * 1e6, 1) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,64,256")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--api-workers", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="where Python spends it, on stdout; the times are then much too long")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    points = [measure(int(b), args.steps, args.api_workers, args.profile) for b in args.batch.split(",")]
    print(json.dumps(points))
    if args.output is not None:
        args.output.write_text(json.dumps({"points": points}) + "\n")


if __name__ == "__main__":
    main()
