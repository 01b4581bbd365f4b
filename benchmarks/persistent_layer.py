"""A decode step whose layers are one kernel each, beside the step as it is compiled: both as CUDA graphs, on this machine's GPU. Prints JSON.

    python benchmarks/persistent_layer.py CONFIG_DIR_OR_MODEL [--batch 1,16] [--context 200] [-o FILE.json]

A persistent kernel (`compiler/codegen/persistent.py`) has as many programs as the GPU holds at once; every number and size of them that fits
is tried. What a step must beat is the latency of five or more launches a layer, which overlap.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import here
from kernel_profile import batch_of, compiled

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.gate import relative
from ingot.artifacts.plan import Kernel, Variant
from ingot.compiler.codegen.emit import described, load_here
from ingot.compiler.codegen.persistent import SYMBOL, layers, persistent
from ingot.compiler.measure import event_seconds
from ingot.ops.kernel import Source
from ingot.runtime.bind import tickets
from ingot.runtime.cuda_graph import capture
from ingot.runtime.executor import Executor
from ingot.runtime.memory import plan_memory

PROGRAMS = ((1, 4), (2, 4), (3, 4), (4, 4), (1, 8), (2, 8), (1, 16))  # a multiprocessor, warps of each
REPEATS = 20


def source_of(artifact: Artifact, kernel: Kernel) -> Source:
    """What a kernel was compiled from, as the artifact tells it."""
    facts, text = described(artifact.path(kernel.source).read_text())
    constants = {name: ast.literal_eval(value) for name, value in facts["constants"].items()}
    return Source(kernel.family, "triton", kernel.symbol, text, facts["signature"], constants, num_warps=kernel.num_warps)


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Median time of a replay."""
    return round(event_seconds(graph.replay, REPEATS) * 1e6, 1)


def resident(function: Any) -> int:
    """Programs of a loaded kernel that the whole GPU holds at once."""
    found = function.driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function.handle, function.num_threads, function.shared_bytes)
    assert int(found[0]) == 0, found
    return int(found[1]) * torch.cuda.get_device_properties(0).multi_processor_count


def measure(executor: Executor, variant: Variant, sources: dict[str, Source], context: int) -> dict[str, Any]:
    """Microseconds of the step as it is, and with layers of each number and size of programs that fits."""
    batch = batch_of(executor, variant.max_tokens, 1, context)
    expected = executor.logits(batch).clone()  # leaves the step's inputs on the device
    count = torch.cuda.get_device_properties(0).multi_processor_count

    def graph_of(plan: Variant) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        bound = executor._bind_part(plan, batch.padded, slice(None))
        return capture(bound, torch.cuda.graph_pool_handle(), torch.cuda.Stream()), bound.results[0]

    more = tickets([persistent(variant, sources, count)[0]], executor.device)
    before = {name: executor._roots[name] for name in more}  # graphs captured at start draw from it
    executor._roots |= more
    graph, _ = graph_of(variant)
    repeated = layers(variant)
    found: dict[str, Any] = {"launches_a_layer": repeated[0].stop - repeated[0].start, "as_compiled_us": microseconds(graph), "persistent": []}
    for each, warps in PROGRAMS:
        joined, source = persistent(variant, sources, each * count, num_warps=warps)
        function = load_here([source], here())[source]
        point: dict[str, Any] = {"programs": each * count, "warps": warps}
        found["persistent"].append(point)
        if resident(function) < each * count:
            point["refused"] = f"the GPU holds {resident(function)} of them"
            continue
        executor._kernels[SYMBOL] = function
        graph, logits = graph_of(joined)
        graph.replay()
        torch.cuda.synchronize()
        point |= {"us": microseconds(graph), "error": relative(logits[: batch.size.num_rows], expected)}
        print(point, flush=True)
    executor._roots |= before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    artifact, plans = compiled(args.model)
    sources = {k.name: source_of(artifact, k) for k in artifact.manifest.kernels}
    executor = Executor(artifact, plans, plan_memory(artifact, plans.values(), max_model_len=4096, utilization=0.5, num_pages=None))
    with torch.inference_mode():
        points = {n: measure(executor, plans[f"decode_{n}"], sources, args.context) for n in map(int, args.batch.split(","))}
    result = {"model": args.model, "device": torch.cuda.get_device_name(), "context": args.context, "batches": points}
    print(json.dumps(result))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
