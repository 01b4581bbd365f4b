"""Where a step's GPU time goes: every kernel of a plan, by name, from torch's profiler.

    python benchmarks/kernel_profile.py CONFIG_DIR_OR_MODEL [--batch 1,16,64,256] [--prefill 1024,8192] [--quantize fp8] [-o FILE.json]

Decode steps are replays of the captured graph at `--context` cached tokens on shuffled pages; prefills of up to 1,024
tokens too, larger ones are launched entry by entry.
"busy_us" is the sum of the kernels' times, which overlap where one waits for another; "event_us" a step's time among steps that follow each other without the
host between them. All steps are timed before the first is profiled: once torch's profiler has run, every later call of CUDA in the process is slower.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.plan import Variant
from ingot.compiler.build import CompileOptions, compile_model
from ingot.compiler.measure import event_seconds
from ingot.runtime.batch import StepBatch, StepSize
from ingot.runtime.executor import Executor
from ingot.runtime.memory import plan_memory
from ingot.runtime.records import GREEDY, WORDS

REPEATS = 5
IN_A_ROW = 20
"""Decode steps in what is timed."""


def compiled(model: str, quantize: str = "none") -> tuple[Artifact, dict[str, Variant]]:
    """The artifact of a model with made-up weights, and its plans by name."""
    artifact = Artifact.open(compile_model(model, CompileOptions(dummy_weights=True, quantize=quantize)).path)
    return artifact, {name: artifact.plan(name) for name in artifact.manifest.variants}


def executor_of(artifact: Artifact, plans: dict[str, Variant]) -> Executor:
    """With the whole card's memory."""
    return Executor(artifact, plans, plan_memory(artifact, plans.values(), max_model_len=16384, utilization=0.9, num_pages=None))


def batch_of(executor: Executor, num_seqs: int, num_new: int, context: int) -> StepBatch:
    """`num_seqs` sequences of `context` cached and `num_new` new tokens; the last token of each samples, greedily."""
    length = context + num_new
    size = StepSize(num_seqs * num_new, num_seqs, num_seqs, length)
    batch = executor.batch(size)
    arrays = {name: array[: size[batch.fields[name].axis]] for name, array in batch.arrays.items()}
    generator = torch.Generator().manual_seed(0)
    arrays["token_ids"][:] = torch.randint(0, executor.info.vocab_size, (num_seqs * num_new,), generator=generator).numpy()
    batch.arrays["cu_seqlens_q"][: num_seqs + 1] = range(0, num_seqs * num_new + 1, num_new)
    arrays["seq_lens"][:] = length
    arrays["logits_rows"][:] = range(num_new - 1, num_seqs * num_new, num_new)
    for group, _, _ in executor.layout.page_groups:
        info = executor.info.groups[group]
        page, used = info.page_size, -(-length // info.page_size)
        pages = torch.randperm(info.num_units, generator=generator)[: num_seqs * used].view(num_seqs, used)
        arrays[f"page_table_{group}"][:, :used] = pages.numpy()
        place = torch.arange(context, length)
        arrays[f"slot_mapping_{group}"][:] = (pages[:, place // page] * page + place % page).flatten().numpy()
    arrays["positions"][:] = list(range(context, length)) * num_seqs
    batch.sample(np.repeat(GREEDY, num_seqs).view(np.int32).reshape(num_seqs, WORDS))
    return batch


def step_seconds(executor: Executor, batch: StepBatch, in_a_row: int) -> float:
    """Of one of several steps in a row, the first of which waits for the host."""

    def steps() -> None:
        for _ in range(in_a_row):
            executor.logits(batch)

    steps()
    return event_seconds(steps, REPEATS) / in_a_row


def kernels_of(executor: Executor, batch: StepBatch) -> dict[str, Any]:
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(REPEATS):
            executor.logits(batch)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem"):
            kernels.setdefault(event.name[:70], []).append(event.time_range.elapsed_us())
    rows = sorted(((sum(t) / REPEATS, len(t) / REPEATS, name) for name, t in kernels.items()), reverse=True)
    return {
        "busy_us": round(sum(r[0] for r in rows), 1),
        "kernels": [{"name": n, "us": round(t, 1), "count": c, "us_each": round(t / c, 2)} for t, c, n in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--batch", default="1,16,64,256")
    parser.add_argument("--prefill", default="1024,8192")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    artifact, plans = compiled(args.model, args.quantize)
    print(args.model, "compile seconds", artifact.manifest.report["seconds"])
    executor = executor_of(artifact, plans)
    points = [(kind, n) for kind, sizes in (("decode", args.batch), ("prefill", args.prefill)) for n in map(int, filter(None, sizes.split(",")))]
    found: dict[str, dict[str, Any]] = {}

    def step(kind: str, n: int) -> StepBatch:
        return batch_of(executor, n, 1, args.context) if kind == "decode" else batch_of(executor, 1, n, 0)

    with torch.inference_mode():
        for kind, n in points:
            found[f"{kind} {n}"] = {"event_us": round(step_seconds(executor, step(kind, n), IN_A_ROW if kind == "decode" else 2) * 1e6, 1)}
        for kind, n in points:
            r = found[f"{kind} {n}"]
            r |= kernels_of(executor, step(kind, n))
            print(f"\n{kind} {n}: event {r['event_us']} µs, busy {r['busy_us']} µs")
            for k in r["kernels"][:11]:
                print(f"  {k['us']:9.1f} µs  {k['count']:6.1f} × {k['us_each']:8.2f}  {k['name']}")
    if args.output is not None:
        args.output.write_text(json.dumps({"model": args.model, "device": torch.cuda.get_device_name(), "points": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
