"""A model with recurrent states on the CPU: Ingot beside transformers without its optional kernels, in one run, and the floor. Prints JSON.

    python benchmarks/cpu_recurrent.py --config DIR [--threads 2] [--dtype bfloat16] [--tokens 16] [--prompt 256] [--rounds 5] [--cpu-seconds]

Random weights on both sides, batch 1. A prompt is computed in one step; a decode step is one token after it. Sides alternate, so that drift of the
machine hits both, and medians are compared: of this process's CPU time with --cpu-seconds, for a machine that has other work. The floor of a decode
step reads each weight, and reads and writes each state, at the measured bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_decode import read_bandwidth
from transformers import AutoConfig, AutoModelForCausalLM

from ingot.artifacts.artifact import Artifact
from ingot.compiler.build import CompileOptions, compile_model
from ingot.runtime.llm import LLM
from ingot.runtime.request import Request, SamplingParams
from ingot.serve.bench.floor import Floor

Clock = Callable[[], float]


def ingot_times(llm: LLM, prompt: list[int], tokens: int, clock: Clock) -> tuple[float, list[float]]:
    """Seconds of the prompt's step, and of each decode step, scheduling and sampling included."""
    llm.engine.add(Request("bench", prompt, SamplingParams(temperature=0.0, max_tokens=tokens + 1, ignore_eos=True)))
    times = []
    while llm.engine.has_work:
        start = clock()
        llm.engine.step()
        times.append(clock() - start)
    return times[0], times[-tokens:]


def transformers_times(model: Any, prompt: list[int], tokens: int, clock: Clock) -> tuple[float, list[float]]:
    """The same of transformers' forward, eager, with its cache."""
    times, given = [], torch.tensor([prompt])
    cache: dict[str, Any] = {}
    with torch.no_grad():
        for _ in range(tokens + 1):
            start = clock()
            out = model(input_ids=given, use_cache=True, **cache)
            times.append(clock() - start)
            name = "cache_params" if hasattr(out, "cache_params") else "past_key_values"
            cache, given = {name: getattr(out, name)}, torch.tensor([[5]])
    return times[0], times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-seconds", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    built = compile_model(str(args.config), CompileOptions(target="cpu", dtype=args.dtype, dummy_weights=True, max_num_seqs=4))
    artifact = Artifact.open(built.path)
    model = artifact.manifest.model
    llm = LLM(built.path, num_threads=args.threads, enable_prefix_caching=False, max_model_len=1024)
    config = AutoConfig.from_pretrained(args.config)
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    bandwidth, floor = read_bandwidth(), Floor.of(artifact)
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    prompt = torch.randint(0, model.vocab_size, (args.prompt,)).tolist()
    rounds: dict[str, list[tuple[float, list[float]]]] = {"ingot": [], "transformers": []}
    for i in range(args.rounds + 1):
        found = {"ingot": ingot_times(llm, prompt, args.tokens, clock), "transformers": transformers_times(other, prompt, args.tokens, clock)}
        for name, once in found.items() if i else ():  # the first warms up
            rounds[name].append(once)
    result: dict[str, Any] = {"model": model.name, "dtype": args.dtype, "threads": args.threads, "device": artifact.manifest.target.device}
    for name, times in rounds.items():
        result[f"{name}_prompt_ms"] = statistics.median(p for p, _ in times) * 1e3
        result[f"{name}_decode_ms"] = statistics.median(t for _, steps in times for t in steps) * 1e3
    nbytes = floor.read(1, 1) + 2 * floor.state_bytes
    result |= {"state_mb": floor.state_bytes / 1e6, "bandwidth_gb_s": bandwidth / 1e9, "decode_floor_ms": nbytes / bandwidth * 1e3}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
