"""Which tiles are fastest for products with few rows: every tile of a wide grid, at the shapes of real models, as a chain in a CUDA graph.

    python benchmarks/gpu_tiles.py [--rows 1,16,64] [-o FILE.json]

Each candidate runs on as many copies of its operands as the cache cannot hold, one launch after the other, so that what overlaps
in a step overlaps here. The lists in `ops/triton/linear.py` begin with what wins here most often.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import here

import ingot.ops.library  # noqa: F401  (a claimant too)
from ingot.artifacts import gate
from ingot.compiler.codegen.emit import load_here
from ingot.compiler.measure import Stopwatch
from ingot.ops import triton as families
from ingot.ops.kernel import Call, Candidate, Steps, Tensor, claimants
from ingot.ops.target import SHARED_MEMORY_BYTES, Target

BF16 = torch.bfloat16
SHAPES = {"qwen3-0.6b": (1024, 4096, 2048, 3072), "llama-3.1-8b": (4096, 6144, 4096, 14336)}  # hidden, qkv rows, o columns, intermediate


def calls(hidden: int, qkv: int, o: int, intermediate: int) -> dict[str, Call]:
    t = {"T": 1}
    x, norm = Tensor(BF16, (t, hidden)), {"norm_weight": Tensor(BF16, (hidden,)), "eps": 1e-6, "offset": 0.0}

    def add(k: int) -> Call:
        return Call("linear_add", {"x": Tensor(BF16, (t, k)), "weight": Tensor(BF16, (hidden, k)), "bias": None, "residual": x}, (x,))

    def normed(op: str, n: int, out: int, **rest: Any) -> Call:
        args = {"x": x, "norm_weight": norm["norm_weight"], "weight": Tensor(BF16, (n, hidden)), **rest, "eps": 1e-6, "offset": 0.0}
        return Call(op, args, (Tensor(BF16, (t, out)),))

    return {
        "qkv": normed("rms_norm_linear", qkv, qkv, bias=None),
        "o": add(o),
        "gate_up": normed("rms_norm_linear_glu", 2 * intermediate, intermediate, act="silu"),
        "down": add(intermediate),
    }


def widen() -> None:
    """Replace the families' short lists of tiles by wide grids."""
    from ingot.ops.triton import linear

    linear.GEMV_TILES = tuple(itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (2, 4, 8)))
    linear.GEMV_TILES = tuple(t for t in linear.GEMV_TILES if t[0] > 1 and 32 <= t[0] * t[1] / (32 * t[2]) <= 64)
    grid = [(n, k, w, s) for n in (16, 32, 64, 128) for k in (64, 128, 256) for w in (4, 8) for s in (3, 4, 6, 8) if n * k * s in (24576, 32768, 49152, 65536)]
    linear.FEW_ROWS = tuple(linear.Tile(16, *t) for t in grid)
    linear.SOME_ROWS = tuple(linear.Tile(64, *t) for t in grid if (64 + t[0]) * t[1] * t[3] * 2 < SHARED_MEMORY_BYTES["sm_90"])


Problem = tuple[str, Call, Steps, list[Candidate]]
"""Its name, a call, its steps, and the candidates to time."""


def timed(todo: Sequence[Problem], target: Target) -> Iterator[tuple[str, Call, dict[str, float]]]:
    """Of each problem its name, its call and the microseconds of every candidate, the fastest first. Each must agree with the reference."""
    emitted = load_here(list({x.source: None for *_, found in todo for c in found for x in c.launches if x.source.backend != "torch"}), target)
    print(len(emitted), "kernels", flush=True)
    device = torch.device("cuda")
    trials = gate.Trials(device)
    for name, call, steps, found in todo:
        times: dict[str, float] = {}
        trial, watch = trials.of(call, steps), Stopwatch(call, steps, device)
        for candidate in found:
            loaded = [None if launch.source.backend == "torch" else emitted[launch.source] for launch in candidate.launches]
            worst = trial.error(candidate, loaded)
            assert worst < gate.tolerance(call), (name, candidate.name, worst)
            times[candidate.name] = round(watch.seconds(candidate, loaded) * 1e6, 2)
        yield name, call, dict(sorted(times.items(), key=lambda t: t[1]))
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    families.load()
    widen()
    target = here()
    todo: list[Problem] = []
    for model, shape in SHAPES.items():
        for rows in map(int, args.rows.split(",")):
            steps = Steps(rows, rows, 1, rows, True)
            todo += [(f"{model} {name} {rows}", call, steps, claimants(call, steps, target)) for name, call in calls(*shape).items()]
    results = {}
    for name, call, times in timed(todo, target):
        nbytes, best = call.args["weight"].shape[0] * call.args["weight"].shape[1] * 2, list(times.items())
        results[name] = {"bytes": nbytes, "us": times}
        print(f"{name:28} {nbytes / best[0][1] / 1e6:6.2f} TB/s  " + "  ".join(f"{n.replace('rms_norm', 'norm')} {t}" for n, t in best[:4]), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
