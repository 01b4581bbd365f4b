"""What HTTP costs: the same requests through `LLM.generate` and as concurrent streams from `ingot serve`, and the ratio. Prints JSON.

    python benchmarks/http_streams.py CONFIG_DIR_OR_MODEL [--streams 256] [--tokens 256] [--api-workers 1,2,4] [-o FILE.json]
    python benchmarks/http_streams.py --null-step-ms 10.3   # no model: an executor that computes nothing takes so long a step

Prompts are random token ids, so that models without a tokenizer are served too. Every stream must end with the number of tokens it
asked for; otherwise the script fails. Clients are processes of their own (`--clients`), since one of them is slower than a server.
The best of `--rounds` counts on both sides. The CPU time of each kind of process is given by token and, from a round with answers of one
token, by request; of the engine's also by step, which is a token of each stream. It says what a machine with cores enough will do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import null_engine
import numpy as np
import psutil

from ingot.serve.bench import serve
from ingot.serve.bench.sse import Endpoint
from ingot.serve.bench.workload import Call


def prompts(args: argparse.Namespace) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(3, 1500, (args.streams, args.prompt_tokens)).tolist()


def direct(args: argparse.Namespace) -> float:
    """Seconds through `LLM.generate`."""
    from ingot.runtime import LLM, SamplingParams

    llm = LLM(args.model, enable_prefix_caching=False) if args.null_step_ms is None else LLM.over(null_engine.engine(args.null_step_ms / 1e3))
    params = SamplingParams(max_tokens=args.tokens, temperature=args.temperature, ignore_eos=True)
    seconds = []
    for i in range(args.rounds):
        asked = fresh(prompts(args), i)
        begin = time.perf_counter()
        llm.generate(asked, params)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def fresh(asked: list[list[int]], i: int) -> list[list[int]]:
    """Others for each round: nothing of them is in the prefix cache."""
    return [[(t + i) % 1500 for t in p] for p in asked]


def stream(url: str, asked: list[list[int]], tokens: int, temperature: float) -> dict[str, Any]:
    """One client's share, all at once."""
    load = serve.Load(Endpoint(url), temperature=temperature)
    begin = time.process_time()
    result = serve.run(load, [Call(p, tokens, 0.0) for p in asked], lambda stage, done: None)
    return result | {"cpu": time.process_time() - begin}


@dataclass(frozen=True)
class Round:
    """All streams, once: seconds from the first request to the last answer, of CPU by kind of process, and what clients saw."""

    seconds: float
    cpu: dict[str, float]
    clients: list[dict[str, Any]]


class Streams:
    """A server, and clients that ask it."""

    def __init__(self, url: str, server: psutil.Process, pool: Any, args: argparse.Namespace) -> None:
        self._url, self._server, self._pool, self._args = url, server, pool, args

    def round(self, asked: list[list[int]], tokens: int) -> Round:
        args, before, begin = self._args, self._cpu(), time.perf_counter()
        results = self._pool.starmap(stream, [(self._url, asked[c :: args.clients], tokens, args.temperature) for c in range(args.clients)])
        seconds, after = time.perf_counter() - begin, self._cpu()
        if sum(r["errors"] for r in results) or sum(r["output_tokens"] for r in results) != args.streams * tokens:
            raise SystemExit(f"streams failed or ended early: {[r['error_messages'] for r in results]}")
        cpu = {name: after[name] - before[name] for name in after} | {"clients": sum(r["cpu"] for r in results)}
        return Round(seconds, cpu, results)

    def _cpu(self) -> dict[str, float]:
        """Seconds so far of the engine's process and of those that speak HTTP."""
        cpu = {"engine": 0.0, "api": 0.0}
        for process in (self._server, *self._server.children()):
            threads = [(task / "schedstat").read_text() for task in Path(f"/proc/{process.pid}/task").iterdir()]
            cpu["engine" if "ingot.serve.engine_main" in process.cmdline() else "api"] += sum(int(t.split()[0]) for t in threads) / 1e9
        return cpu


def over_http(args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """The best round through a server with so many API processes, and what it cost."""
    command = [sys.executable, "-m", "ingot.serve.cli", "serve", args.model, "--port", "0", "--api-workers", str(workers)]
    env = dict(os.environ)
    if args.null_step_ms is not None:
        command = [sys.executable, null_engine.__file__, args.model, str(workers)]
        env[null_engine.STEP_MS] = str(args.null_step_ms)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert server.stdout is not None
    try:
        ready = re.match(r"ready: (http://\S+)", server.stdout.readline())
        if ready is None:
            raise SystemExit("the server did not start")
        asked = prompts(args)
        with multiprocessing.get_context("spawn").Pool(args.clients) as pool:
            pool.map(abs, range(args.clients))  # they are there when the clock starts
            streams = Streams(ready[1], psutil.Process(server.pid), pool, args)
            streams.round(fresh(asked, -1), 1)  # whatever is made at the first time
            alone = streams.round(fresh(asked, -2), 1)
            best = min((streams.round(fresh(asked, i), args.tokens) for i in range(args.rounds)), key=lambda r: r.seconds)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    by_token = {name: (best.cpu[name] - alone.cpu[name]) / (args.streams * (args.tokens - 1)) * 1e6 for name in best.cpu}
    latencies = {k: max(c[k]["p50"] for c in best.clients) for k in ("time_to_first_token_ms", "inter_token_latency_ms") if best.clients[0][k]}
    return {
        "seconds": best.seconds,
        **{f"{k}_p50": round(v, 2) for k, v in latencies.items()},
        "cpu_us_per_token": {name: round(us, 2) for name, us in by_token.items()},
        "cpu_us_per_request": {name: round(s / args.streams * 1e6) for name, s in alone.cpu.items()},
        "engine_cpu_us_per_step": round(by_token["engine"] * args.streams),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--null-step-ms", type=float, help="instead of a model: an executor that computes nothing and takes so long a step")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--api-workers", default="1,2,4")
    parser.add_argument("--clients", type=int, default=max(1, min(4, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--direct", action="store_true", help="only LLM.generate over an artifact; prints its seconds")
    args = parser.parse_args()
    if (args.model is None) == (args.null_step_ms is None):
        parser.error("give a model or --null-step-ms")
    if args.direct:
        print(direct(args))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    print(json.dumps(result))
    if args.output is not None:
        args.output.write_text(json.dumps(result) + "\n")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if args.null_step_ms is not None:
        name, args.model = f"none: an executor that computes nothing, {args.null_step_ms} ms a step", str(folder / "null")
        null_engine.write_artifact(Path(args.model))
    else:
        from ingot.compiler.build import CompileOptions, compile_model

        name = Path(args.model).name
        args.model = str(compile_model(args.model, CompileOptions(dummy_weights=args.model != "bundled")).path)
    total = args.streams * args.tokens
    # in a process of its own, which leaves the device to the server
    own = [sys.executable, __file__, args.model if args.null_step_ms is None else f"--null-step-ms={args.null_step_ms}"]
    own += ["--direct", *(f"--{n}={getattr(args, n.replace('-', '_'))}" for n in ("streams", "prompt-tokens", "tokens", "temperature", "rounds"))]
    generate = float(subprocess.run(own, capture_output=True, text=True, check=True).stdout)
    result: dict[str, Any] = {
        "model": name, "streams": args.streams, "prompt_tokens": args.prompt_tokens, "tokens": args.tokens, "clients": args.clients, "cores": os.cpu_count(),
        "generate_tokens_per_second": round(total / generate, 1), "http": [],
    }  # fmt: skip
    for workers in map(int, args.api_workers.split(",")):
        found = over_http(args, workers)
        result["http"].append({
            "api_workers": workers, "tokens_per_second": round(total / found["seconds"], 1), "ratio": round(generate / found.pop("seconds"), 4), **found,
        })  # fmt: skip
        print(result["http"][-1], file=sys.stderr, flush=True)
    return result


if __name__ == "__main__":
    main()
