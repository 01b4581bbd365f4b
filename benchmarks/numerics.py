"""How far logits are from float32: Ingot's beside those of transformers in the same precision. Prints JSON.

    python benchmarks/numerics.py --model bundled --prompts 8
    python benchmarks/numerics.py --config DIR --save DIR   (random weights, saved once; both read them)

Per path (one ragged prefill in chunks, and token-by-token decode of all prompts in one batch): ‖logits − logits₃₂‖ / ‖logits₃₂‖,
and the ratio of the two errors. On a GPU the decode steps are CUDA graphs, which is checked.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.settings import settings
from ingot.compiler.build import CompileOptions, compile_model
from ingot.models.source import BUNDLED
from ingot.runtime.batch import StepLayout, StepSize
from ingot.runtime.executor import Executor
from ingot.runtime.memory import plan_memory

CONTEXT = 1024
"""Tokens that the pages of each prompt hold."""


def save_random(config: Path, folder: Path) -> None:
    """The model of `config` with transformers' own initialization, seed 0, in bfloat16."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.bfloat16)
        model.save_pretrained(folder)


def reference(folder: Path, prompts: list[list[int]], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Logits [len(prompt), V] of each prompt, float32, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([p], device=device)).logits[0].float().cpu() for p in prompts]
    del model
    gc.collect()
    return logits


def run(executor: Executor, layout: StepLayout, prompts: list[list[int]], chunks: list[list[int]]) -> tuple[list[torch.Tensor], bool]:
    """Logits at every token when step i computes chunks[i][s] tokens of prompt s; and whether all steps were CUDA graphs."""
    done = [0] * len(prompts)
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    captured = True
    for sizes in chunks:
        active = [s for s, n in enumerate(sizes) if n]
        tokens = sum(sizes)
        size = StepSize(tokens, len(active), tokens, CONTEXT)
        batch = executor.batch(size)
        arrays, at = batch.arrays, 0
        arrays["logits_rows"][:tokens] = range(tokens)
        for i, s in enumerate(active):
            n, begin = sizes[s], done[s]
            positions = list(range(begin, begin + n))
            arrays["token_ids"][at : at + n] = prompts[s][begin : begin + n]
            arrays["positions"][at : at + n] = positions
            arrays["cu_seqlens_q"][i + 1] = at + n
            arrays["seq_lens"][i] = begin + n
            for group, page_size, _ in layout.page_groups:
                pages = CONTEXT // page_size
                arrays[f"page_table_{group}"][i] = range(s * pages, (s + 1) * pages)
                arrays[f"slot_mapping_{group}"][at : at + n] = [s * CONTEXT + p for p in positions]
            at += n
        captured &= executor.captured(size)
        logits, at = executor.logits(batch).float().cpu(), 0
        for s in active:
            rows[s].append(logits[at : at + sizes[s]])
            done[s] += sizes[s]
            at += sizes[s]
    return [torch.cat(r) for r in rows], captured


def error(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    a, b = torch.cat(actual).double(), torch.cat(exact).double()
    return float((a - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--save", type=Path, help="where the random model is kept, with --config")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args()
    folder = BUNDLED if args.model == "bundled" else Path(args.model)
    if args.config is not None:
        folder = args.save
        save_random(args.config, folder)
    rng = random.Random(0)
    vocab = AutoConfig.from_pretrained(folder).vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(20, 60))] for _ in range(args.prompts)]

    built = compile_model(str(folder), CompileOptions(target=args.target, dtype=args.dtype))
    artifact = Artifact.open(built.path)
    device = torch.device("cuda" if artifact.manifest.target.kind == "cuda" else "cpu")
    torch.set_num_threads(settings().num_threads)
    exact = reference(folder, prompts, torch.float32, device)
    theirs = error(reference(folder, prompts, getattr(torch, args.dtype), device), exact)
    plans = {v: artifact.plan(v) for v in artifact.manifest.variants}
    memory = plan_memory(artifact, plans.values(), max_model_len=CONTEXT, utilization=0.9, num_pages=64 * args.prompts)
    executor = Executor(artifact, plans, memory)
    layout = executor.layout

    longest = max(map(len, prompts))
    ragged = [[max(0, min(17 + 3 * s, len(p) - i * (17 + 3 * s))) for s, p in enumerate(prompts)] for i in range(longest)]
    decode = [[int(i < len(p)) for p in prompts] for i in range(longest)]
    result = {"model": str(folder.name), "dtype": args.dtype, "target": str(artifact.manifest.target), "transformers_error": theirs}
    for name, chunks in (("prefill", [c for c in ragged if sum(c)]), ("decode", decode)):
        logits, captured = run(executor, layout, prompts, chunks)
        ours = error(logits, exact)
        result[name] = {"error": ours, "ratio": ours / theirs, "cuda_graph": captured and device.type == "cuda"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
