"""What each launch of a decode layer costs its step: the step's time less its time without that launch, in all layers, a layer.

    python benchmarks/without.py CONFIG_DIR_OR_MODEL [--batch 16,256] [--quantize fp8] [--context 200] [-o FILE.json]

Kernels of a step overlap, so that a launch which ends in the shadow of another costs less here than it takes alone, and one that keeps its neighbours apart
costs more: the sum is not the layer's time. A step without one of its kernels computes nonsense, in the time that it takes.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from kernel_profile import IN_A_ROW, batch_of, compiled, step_seconds

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.plan import Entry, Variant
from ingot.runtime.executor import Executor
from ingot.runtime.memory import plan_memory


def places(entries: tuple[Entry, ...]) -> list[int | None]:
    """Of each entry how many lie between it and its layer's attention; None before the first and behind the last layer's."""
    found: list[int | None] = []
    place = None
    for entry in entries:
        place = 0 if "attention" in entry.kernel else None if place is None else place + 1
        found.append(place)
    last = max(i for i, p in enumerate(found) if p == 0)
    return found[:last] + [None] * (len(entries) - last)


def microseconds(artifact: Artifact, plans: Mapping[str, Variant], num_seqs: int, context: int) -> float:
    """Of a decode step of `num_seqs` sequences with `context` cached tokens."""
    page = min(g.page_size for g in artifact.manifest.groups if g.kind == "page")
    memory = plan_memory(artifact, plans.values(), max_model_len=context + 64, utilization=0.9, num_pages=num_seqs * (context // page + 2))
    executor = Executor(artifact, dict(plans), memory)
    with torch.inference_mode():
        found = step_seconds(executor, batch_of(executor, num_seqs, 1, context), IN_A_ROW) * 1e6
    del executor
    gc.collect()
    torch.cuda.empty_cache()
    return found


def costs(artifact: Artifact, plans: Mapping[str, Variant], num_seqs: int, context: int) -> dict[str, Any]:
    name, whole = next((n, v) for n, v in plans.items() if v.entry_point == "forward" and v.decodes and num_seqs in v.capture)
    others = {n: v for n, v in plans.items() if v.entry_point != "forward"}

    def seconds_of(entries: tuple[Entry, ...]) -> float:
        return microseconds(artifact, {**others, name: msgspec.structs.replace(whole, entries=entries, capture=(num_seqs,))}, num_seqs, context)

    at, step = places(whole.entries), seconds_of(whole.entries)
    launches = []
    for place in range(1 + max(p for p in at if p is not None)):
        rest = tuple(e for e, p in zip(whole.entries, at, strict=True) if p != place)
        entry = whole.entries[at.index(place)]
        launches.append({"op": entry.target, "kernel": entry.kernel, "us": round((step - seconds_of(rest)) / at.count(place), 2), "reason": entry.reason})
        print(f"  {launches[-1]['us']:8.2f} µs  {entry.target}  {entry.kernel}", flush=True)
    return {"step_us": round(step, 1), "launches": launches}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--batch", default="16,256")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    artifact, plans = compiled(args.model, args.quantize)
    found = {}
    for num_seqs in map(int, args.batch.split(",")):
        print(f"{args.model} {args.quantize}, batch {num_seqs}")
        found[str(num_seqs)] = costs(artifact, plans, num_seqs, args.context)
    if args.output is not None:
        figures = {"model": args.model, "quantize": args.quantize, "context": args.context, "device": torch.cuda.get_device_name(), "batch": found}
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
