"""What --deterministic keeps and costs on this machine: tokens alone and in company, bit for bit, and the time of a decode step with and without.

python benchmarks/deterministic.py [MODEL] [--dummy-weights] [--batches 1,64]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from ingot.compiler.build import CompileOptions, compile_model
from ingot.runtime.llm import LLM
from ingot.runtime.request import SamplingParams
from ingot.serve.bench import latency

PROMPTS = 48


def equal(path: Path) -> dict[str, int]:
    """How many of some prompts say the same alone as among all the others: tokens, and log-probabilities to the last bit."""
    llm = LLM(path, enable_prefix_caching=False)
    rng = random.Random(0)
    prompts = [[rng.randrange(llm.engine.vocab_size) for _ in range(rng.randint(1, 300))] for _ in range(PROMPTS)]
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, logprobs=1)
    together = llm.generate(prompts, params)
    alone = [llm.generate([p], params)[0] for p in prompts]
    pairs = [(a.outputs[0], b.outputs[0]) for a, b in zip(alone, together, strict=True)]
    return {
        "prompts": PROMPTS,
        "equal_tokens": sum(a.token_ids == b.token_ids for a, b in pairs),
        "equal_bits": sum(a.logprobs == b.logprobs for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--dummy-weights", action="store_true")
    parser.add_argument("--batches", default="1,64")
    args = parser.parse_args()
    for deterministic in (False, True):
        path = compile_model(args.model, CompileOptions(deterministic=deterministic, dummy_weights=args.dummy_weights)).path
        timed = latency.run(path, [int(b) for b in args.batches.split(",")], [1024], 3, lambda stage, done: None)
        times = {f"decode_{d['batch']}_ms": d.get("ms") for d in timed["decode"]} | {f"prefill_{p['tokens']}_ms": p.get("ms") for p in timed["prefill"]}
        print(json.dumps({"model": args.model, "deterministic": deterministic, "target": timed["target"], **equal(path), **times}), flush=True)


if __name__ == "__main__":
    main()
