"""Decode at batch 1 on the CPU: Ingot beside transformers with torch.compile, in one run, and the share of memory bandwidth. Prints JSON.

    python benchmarks/cpu_decode.py --config DIR [--threads 2] [--dtype bfloat16] [--tokens 32]

Random weights on both sides; prompts of 128 random tokens. A step is one token after the prompt: the median of engine steps
with Ingot, of compiled forwards over a static cache with transformers. Sides alternate, so that drift of the machine hits both. The floor is what a
step reads of the weights, of experts those that a token has, at the bandwidth measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from ingot.artifacts.artifact import Artifact
from ingot.compiler.build import CompileOptions, compile_model
from ingot.runtime.llm import LLM
from ingot.runtime.request import Request, SamplingParams
from ingot.serve.bench.floor import Floor

PROMPT = 128


def read_bandwidth() -> float:
    """Bytes a second that all threads read together: the best of ten sums over 512 MB."""
    data = torch.ones(1 << 27)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


class Transformers:
    """One token at a time through transformers' model, its forward compiled by torch.compile."""

    def __init__(self, config: Path, dtype: torch.dtype) -> None:
        cfg = AutoConfig.from_pretrained(config)
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(cfg, dtype=dtype).eval()
        self.cache = StaticCache(config=cfg, max_cache_len=512)
        self.forward = torch.compile(self.model.forward)
        with torch.no_grad():
            self.model(input_ids=torch.randint(0, cfg.vocab_size, (1, PROMPT)), past_key_values=self.cache, use_cache=True)
        self.position = PROMPT
        for _ in range(3):
            self.step()

    def step(self) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            self.forward(input_ids=torch.tensor([[5]]), past_key_values=self.cache, use_cache=True, position_ids=torch.tensor([[self.position]]))
        self.position += 1
        return time.perf_counter() - start


def ingot_steps(llm: LLM, tokens: int, vocab: int) -> list[float]:
    """Seconds of each decode step of one request, scheduling and sampling included."""
    prompt = torch.randint(0, vocab, (PROMPT,)).tolist()
    llm.engine.add(Request("bench", prompt, SamplingParams(temperature=0.0, max_tokens=tokens + 1, ignore_eos=True)))
    times = []
    while llm.engine.has_work:
        start = time.perf_counter()
        llm.engine.step()
        times.append(time.perf_counter() - start)
    return times[-tokens:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    built = compile_model(str(args.config), CompileOptions(target="cpu", dtype=args.dtype, dummy_weights=True))
    manifest = Artifact.open(built.path).manifest
    llm = LLM(built.path, num_threads=args.threads, enable_prefix_caching=False, max_model_len=512)
    other = Transformers(args.config, getattr(torch, args.dtype))
    bandwidth = read_bandwidth()
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(args.rounds):
        ours += ingot_steps(llm, args.tokens, manifest.model.vocab_size)
        theirs += [other.step() for _ in range(args.tokens)]
    step, compiled = statistics.median(ours), statistics.median(theirs)
    nbytes = Floor.of(Artifact.open(built.path)).read(1, 1)
    print(json.dumps({
        "model": manifest.model.name, "dtype": args.dtype, "threads": args.threads, "device": manifest.target.device,
        "ingot_ms": step * 1e3, "transformers_compiled_ms": compiled * 1e3, "speedup": compiled / step,
        "bandwidth_gb_s": bandwidth / 1e9, "floor_ms": nbytes / bandwidth * 1e3, "bandwidth_fraction": nbytes / step / bandwidth,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
