"""Whether a decode step is faster if the small launch before a product, a norm or the rounding of rows, asks for the product's weight while memory is idle.

    python benchmarks/weights_ahead.py CONFIG_DIR_OR_MODEL [--quantize fp8] [--batch 16,64,256] [--megabytes 0,4,8] [--extra 0,128] [--early] [-o FILE.json]

A product asks for the beginning of its weight itself, as soon as it has a multiprocessor, which may be long before its predecessors have ended: what it asks
for then takes bandwidth from them, or has left L2 when it is wanted. The launch before it asks when it has waited. `--megabytes`: how much; `--extra`: programs
beside those that have rows, to ask with; `--early`: before it has waited, for comparison. Kernels are those that the tuning table names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kernel_profile import IN_A_ROW, batch_of, compiled, executor_of, step_seconds

from ingot.compiler import build, select, tuning
from ingot.ops.dims import plus
from ingot.ops.kernel import Call, Candidate, Operand, Steps
from ingot.ops.target import Target
from ingot.ops.triton.prefetch import prefetch_rows
from ingot.ops.triton.source import TYPES, power_of_two, text

SYMBOLS = ("rms_norm_kernel", "round_rows_kernel")
WAIT = "        tl.extra.cuda.gdc_wait()\n"
ASK = """        piece = tl.minimum(tl.program_id(0) * EACH + tl.arange(0, EACH), COUNT - 1).to(tl.int64)
        prefetch_rows(ahead + piece * PITCH + BEGIN, EACH, BYTES, ASKING)
"""


def asking(candidate: Candidate, call: Call, steps: Steps, megabytes: float, extra: int, early: bool) -> Candidate:
    """The candidate, whose first launch asks for the beginning of what each program of the second one reads of the weight."""
    if megabytes == 0 or not steps.exact or steps.max_num_new > 1 or len(candidate.launches) < 2 or candidate.launches[0].source.symbol not in SYMBOLS:
        return candidate
    (first, second, *rest), weight = candidate.launches, call.args["weight"]
    constants, size = second.source.constants, weight.dtype.itemsize
    panel, split = constants.get("PANEL") or 1, constants.get("SPLIT") or 1
    count, pitch = weight.shape[0] // panel * split, weight.shape[1] * panel // split
    begin = (constants.get("PREFETCH") or 0) * panel // size
    nbytes = min(int(megabytes * 2**20) // count // 64 * 64, (pitch - begin) * size // 64 * 64)
    if nbytes <= 0 or weight.shape[1] * panel % split:
        return candidate
    (rows, block), *axes = first.grid
    each = power_of_two(-(-count // (-(-steps.bound(rows) // block) + extra)))
    source = first.source
    assert source.text.count(WAIT) == 1
    changed = source.text.replace(f"def {source.symbol}(", f"def {source.symbol}(ahead, EACH: tl.constexpr, COUNT: tl.constexpr, PITCH: tl.constexpr, "
                                  "BEGIN: tl.constexpr, BYTES: tl.constexpr, ASKING: tl.constexpr, ")  # fmt: skip
    changed = changed.replace(WAIT, ASK + WAIT if early else WAIT + ASK)
    more = {"EACH": each, "COUNT": count, "PITCH": pitch, "BEGIN": begin, "BYTES": nbytes, "ASKING": 32 * source.num_warps}
    source = replace(source, text=text(prefetch_rows) + "\n\n" + changed, signature={"ahead": "*" + TYPES[weight.dtype], **source.signature},
                     constants=more | source.constants)  # fmt: skip
    first = replace(first, source=source, operands=(Operand(arg="weight"), *first.operands), grid=((plus(rows, extra * block), block), *axes))
    return replace(candidate, launches=(first, second, *rest))


def ask_with(megabytes: float, extra: int, early: bool, batches: list[int]) -> None:
    """Let compilers in this process make such candidates, choose as if they were the others, and make the variants that are timed alone."""
    made: dict[tuple[str, Steps], list[Candidate]] = {}
    candidates, find, variants = select.candidates, tuning.Table.find, build.variants

    def all_asking(call: Call, steps: Steps, target: Target) -> list[Candidate]:
        made[repr(call), steps] = candidates(call, steps, target)
        return [asking(c, call, steps, megabytes, extra, early) for c in made[repr(call), steps]]

    def as_before(table: tuning.Table, call: Call, steps: Steps, found: list[Candidate], layer: str = "") -> Any:
        hit = find(table, call, steps, made[repr(call), steps], layer)
        return hit and (next(c for c in found if c.name == hit[0].name), hit[1])

    def timed(*args: Any) -> list[Any]:
        specs = variants(*args)
        return [s for s in specs if s.steps.max_tokens in batches and s.steps.max_num_new == 1] + specs[-1:]

    select.candidates, tuning.Table.find, build.variants = all_asking, as_before, timed  # type: ignore[method-assign, assignment]


def microseconds(model: str, quantize: str, batches: list[int], context: int) -> dict[str, float]:
    executor = executor_of(*compiled(model, quantize))
    with torch.inference_mode():
        return {str(n): round(step_seconds(executor, batch_of(executor, n, 1, context), IN_A_ROW) * 1e6, 1) for n in batches}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--batch", default="16,64,256")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--megabytes", default="0,4,8")
    parser.add_argument("--extra", default="0,128")
    parser.add_argument("--early", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own: what was asked, as JSON
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    batches = list(map(int, args.batch.split(",")))
    if args.one is not None:
        megabytes, extra = json.loads(args.one)
        ask_with(megabytes, extra, args.early, batches)
        print(json.dumps(microseconds(args.model, args.quantize, batches, args.context)))
        return
    found = []
    for megabytes in map(float, args.megabytes.split(",")):
        for extra in map(int, args.extra.split(",")) if megabytes else [0]:
            with tempfile.TemporaryDirectory() as home:  # the artifact's key knows nothing of this
                again = [sys.executable, *sys.argv, "--one", json.dumps([megabytes, extra])]
                done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"INGOT_HOME": home})
            found.append({"megabytes": megabytes, "extra": extra, "us": json.loads(done.stdout.splitlines()[-1])})
            print(found[-1], flush=True)
    if args.output is not None:
        figures = {"model": args.model, "quantize": args.quantize, "device": torch.cuda.get_device_name(), "early": args.early, "steps": found}
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
