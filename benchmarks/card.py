"""All that a GPU has to say, in the order of what is missed most: runs the other benchmarks one by one, each with a time of its own.

    python benchmarks/card.py CONFIGS_FOLDER -o FOLDER [--minutes 9] [--only tune,tables]

CONFIGS_FOLDER holds folders with a config.json. A part that ended well is not run again, one that was cut off is: it may take up its own
results. FOLDER gets a log for every part, and what the parts write. A part with no time left for half of what it needs is left for the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """A command; {configs}, {out} and {here} are folders."""

    name: str
    minutes: float
    command: str


def benchmark(name: str, minutes: float, script: str, *arguments: str) -> Part:
    return Part(name, minutes, " ".join(("{python} {here}/" + script, *arguments)))


MODELS = "{configs}/qwen3-0.6b {configs}/llama-3.2-1b {configs}/llama-3.1-8b"
PARTS = (
    Part("tests", 4, "{python} -m pytest -q -m gpu -x tests/ops tests/runtime tests/artifacts"),
    Part("tune", 4, "{python} -m ingot.serve.cli tune " + MODELS),
    benchmark("tables", 6, "tables.py", MODELS, "--minutes 5", "--results {out}/tables.json"),
    benchmark("kernels-qwen", 1, "kernel_profile.py", "{configs}/qwen3-0.6b", "-o {out}/kernels-qwen3-0.6b.json"),
    benchmark("kernels-llama", 1.5, "kernel_profile.py", "{configs}/llama-3.1-8b", "-o {out}/kernels-llama-3.1-8b.json"),
    benchmark("without", 1.5, "without.py", "{configs}/llama-3.1-8b", "--quantize fp8", "-o {out}/without-llama-3.1-8b-fp8.json"),
    benchmark("persistent-qwen", 1.5, "persistent_layer.py", "{configs}/qwen3-0.6b", "--batch 1,16,64", "-o {out}/persistent-qwen3-0.6b.json"),
    benchmark("persistent-llama", 1.5, "persistent_layer.py", "{configs}/llama-3.2-1b", "--batch 1,16,64", "-o {out}/persistent-llama-3.2-1b.json"),
    Part("tune-fp8", 2, "{python} -m ingot.serve.cli tune --add --quantize fp8 {configs}/llama-3.1-8b"),
    Part("tune-int4", 2, "{python} -m ingot.serve.cli tune --add --quantize int4-g128 {configs}/llama-3.1-8b"),
    benchmark("quantized", 5, "gpu_quantized.py", "{out}/quantized.json", "--seconds 270"),
    benchmark("tables-fp8", 3, "tables.py", "{configs}/llama-3.1-8b", "--parts latency,throughput", '--flags "--quantize fp8"', "--suffix fp8",
              "--results {out}/tables.json"),
    benchmark("tables-int4", 3, "tables.py", "{configs}/llama-3.1-8b", "--parts latency,throughput", '--flags "--quantize int4-g128"',
              "--suffix int4-g128", "--results {out}/tables.json"),
    benchmark("http", 3, "http_streams.py", "{configs}/llama-3.1-8b", "--api-workers 1,2,4", "-o {out}/http.json"),
    benchmark("numerics", 1, "numerics.py"),
    benchmark("profile", 2, "step_profile.py", "{configs}/qwen3-0.6b", "-o {out}/step-profile.json", "--svg {out}/step-profile.svg"),
    Part("startup", 2, "{python} -m ingot.serve.cli bench startup {configs}/llama-3.1-8b --dummy-weights --server --json"),
    benchmark("deterministic", 1.5, "deterministic.py"),
    benchmark("latent", 3, "tables.py", "{here}/configs/deepseek-v2-lite", "--parts latency", "--results {out}/tables.json"),
    benchmark("recurrent", 3, "tables.py", "{here}/configs/mamba2-2.7b", "--parts latency", "--results {out}/tables.json"),
    benchmark("experts", 4, "tables.py", "{configs}/mixtral-8x7b", "--parts latency", '--flags "--quantize fp8"', "--suffix fp8",
              "--results {out}/tables.json"),
    benchmark("70b-fp8", 4, "gpu_70b.py", "fp8", "-o {out}/70b-fp8.json"),
    benchmark("70b-int4", 4, "gpu_70b.py", "int4-g128", "-o {out}/70b-int4.json"),
)  # fmt: skip


def run(part: Part, configs: Path, out: Path, seconds: float) -> dict[str, float | int | str]:
    """The exit status and the seconds that it took."""
    command = shlex.split(part.command.format(configs=configs, out=out, here=HERE, python=sys.executable))
    begin = time.monotonic()
    with (
        (out / f"{part.name}.log").open("w") as log,
        subprocess.Popen(command, cwd=HERE.parent, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # those that it started hold the GPU too
            status = "cut off"
    return {"status": status, "seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(p.name for p in PARTS))
    args = parser.parse_args()
    out, end = args.output.resolve(), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    record = out / "card.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    wanted = args.only.split(",")
    for part in sorted((p for p in PARTS if p.name in wanted), key=lambda p: wanted.index(p.name)):
        left = end - time.monotonic()
        if done.get(part.name, {}).get("status") == 0 or left < 30 * part.minutes:
            continue
        print(f"{part.name}, at most {min(part.minutes, left / 60):.1f} min", flush=True)
        done[part.name] = run(part, args.configs.resolve(), out, min(60 * part.minutes, left))
        record.write_text(json.dumps(done, indent=1) + "\n")
        print(f"  {done[part.name]}", flush=True)


if __name__ == "__main__":
    main()
