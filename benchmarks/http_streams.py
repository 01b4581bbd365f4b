"""What HTTP costs: the same requests through `LLM.generate` and as concurrent streams from `ingot serve`, and the ratio. Prints JSON.

    python benchmarks/http_streams.py CONFIG_DIR_OR_MODEL [--streams 256] [--tokens 256] [--api-workers 1,2,4] [-o FILE.json]

Prompts are random token ids, so that models without a tokenizer are served too. Every stream must end with the number of tokens it
asked for; otherwise the script fails. Clients are processes of their own (`--clients`), since one of them is slower than a server.
The best of `--rounds` counts on both sides.
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
import time
from pathlib import Path
from typing import Any

import numpy as np

from ingot.serve.bench import serve
from ingot.serve.bench.sse import Endpoint
from ingot.serve.bench.workload import Call


def prompts(args: argparse.Namespace) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(3, 1500, (args.streams, args.prompt_tokens)).tolist()


def direct(args: argparse.Namespace) -> float:
    """Seconds through `LLM.generate`."""
    from ingot.runtime import LLM, SamplingParams

    llm = LLM(args.model, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=args.tokens, temperature=args.temperature, ignore_eos=True)
    seconds = []
    for _ in range(args.rounds):
        begin = time.perf_counter()
        llm.generate(prompts(args), params)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def stream(url: str, asked: list[list[int]], tokens: int, temperature: float) -> dict[str, Any]:
    """One client's share, all at once."""
    load = serve.Load(Endpoint(url), temperature=temperature)
    return serve.run(load, [Call(p, tokens, 0.0) for p in asked], lambda stage, done: None)


def over_http(args: argparse.Namespace, workers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "ingot.serve.cli", "serve", args.model, "--port", "0", "--api-workers", str(workers)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        ready = re.match(r"ready: (http://\S+)", server.stdout.readline())
        if ready is None:
            raise SystemExit("the server did not start")
        best: dict[str, Any] = {}
        asked = prompts(args)
        with multiprocessing.get_context("spawn").Pool(args.clients) as pool:
            pool.map(abs, range(args.clients))  # they are there when the clock starts
            for i in range(args.rounds):
                fresh = [[(t + i) % 1500 for t in p] for p in asked]  # nothing of it is in the prefix cache
                begin = time.perf_counter()
                shares = [(ready[1], fresh[c :: args.clients], args.tokens, args.temperature) for c in range(args.clients)]
                results = pool.starmap(stream, shares)
                seconds = time.perf_counter() - begin
                wrong = sum(r["errors"] for r in results) or sum(r["output_tokens"] for r in results) - args.streams * args.tokens
                if wrong:
                    raise SystemExit(f"streams failed or ended early: {[r['error_messages'] for r in results]}")
                if not best or seconds < best["seconds"]:
                    latencies = {k: max(r[k]["p50"] for r in results) for k in ("time_to_first_token_ms", "inter_token_latency_ms") if results[0][k]}
                    best = {"seconds": seconds, **{f"{k}_p50": round(v, 2) for k, v in latencies.items()}}
        return best
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
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
    if args.direct:
        print(direct(args))
        return
    from ingot.compiler.build import CompileOptions, compile_model

    built = compile_model(args.model, CompileOptions(dummy_weights=args.model != "bundled"))
    name, args.model = args.model, str(built.path)
    total = args.streams * args.tokens
    # in a process of its own, which leaves the device to the server
    own = [sys.executable, __file__, args.model, "--direct"]
    own += [f"--{n}={getattr(args, n.replace('-', '_'))}" for n in ("streams", "prompt-tokens", "tokens", "temperature", "rounds")]
    generate = float(subprocess.run(own, capture_output=True, text=True, check=True).stdout)
    result: dict[str, Any] = {
        "model": Path(name).name, "streams": args.streams, "prompt_tokens": args.prompt_tokens, "tokens": args.tokens, "clients": args.clients,
        "generate_tokens_per_second": round(total / generate, 1), "http": [],
    }  # fmt: skip
    for workers in map(int, args.api_workers.split(",")):
        found = over_http(args, workers)
        result["http"].append({
            "api_workers": workers, "tokens_per_second": round(total / found["seconds"], 1), "ratio": round(generate / found.pop("seconds"), 4), **found,
        })  # fmt: skip
        print(result["http"][-1], file=sys.stderr, flush=True)
    print(json.dumps(result))
    if args.output is not None:
        args.output.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
