"""The figures of the README, through `ingot` alone: compile, latency, throughput, start-up of some models. What is in the results already is not run again.

    python benchmarks/tables.py CONFIG_DIR... [--parts compile,latency,throughput,startup] [--minutes 9] [--flags "--quantize fp8" --suffix fp8]
    python benchmarks/tables.py --show FILE        # as Markdown, beside vLLM

Mixtures of experts are models like the others: benchmarks/configs/deepseek-v2-lite (31 GB in bfloat16) fits a card of 80 GB, Mixtral 8x7B (93 GB)
needs `--flags "--quantize fp8" --suffix fp8` there (47 GB), or a larger one.

Weights are made up on the device. Results go to benchmarks/results/<date>-<device>.json after every part, so that a run which is
cut off loses one part; `--minutes` starts no new part after that time. Compiling is timed twice in stores of their own: `measured` with
every kernel measured (--tune), `table` with the tuning table of the device, if there is one; the store of the last serves the other parts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ingot.compiler.tuning import slug, table_for
from ingot.ops.target import resolve

HERE = Path(__file__).parent
PARTS = ("compile", "latency", "throughput", "startup")
VLLM = HERE / "data" / "vllm-0.26.0-h200.json"


def ingot(*args: object, home: Path) -> dict[str, Any]:
    """What the command prints as JSON, and the seconds that its process took."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "ingot.serve.cli", *map(str, args), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"INGOT_HOME": str(home)}, check=True)
    return json.loads(done.stdout) | {"process_seconds": time.perf_counter() - begin}


def compiled(config: Path, flags: list[str], home: Path) -> dict[str, Any]:
    """Seconds of compiling from an empty store, with every kernel measured and with the tuning table."""
    figures: dict[str, Any] = {}
    tuned = table_for(resolve("auto")).entries
    for name, extra in [("measured", ["--tune"]), *([("table", [])] if tuned else [])]:
        shutil.rmtree(home, ignore_errors=True)
        built = ingot("compile", config, "--dummy-weights", *flags, *extra, home=home)
        report = built["report"]
        figures[name] = {"process_seconds": built["process_seconds"], "seconds": report["seconds"], "kernels_compiled": report["kernels_compiled"]}
    return figures


def run(part: str, config: Path, flags: list[str], home: Path) -> dict[str, Any]:
    if part == "compile":
        return compiled(config, flags, home)
    return ingot("bench", part, config, "--dummy-weights", *flags, home=home)


def show(results: dict[str, Any]) -> str:
    """A Markdown table: a row a figure; for each model Ingot, its floor, vLLM."""
    vllm = json.loads(VLLM.read_text())
    models = results["models"]
    rows: dict[str, dict[str, tuple[float, float | None, float | None]]] = {}
    for name, parts in models.items():
        theirs = vllm["models"].get(name, {}) if results["device"] == vllm["device"] else {}
        for kind, key, label in (("decode", "batch", "decode, batch {}"), ("prefill", "tokens", "prefill {} tokens")):
            for point in parts.get("latency", {}).get(kind, []):
                if "ms" in point:
                    other = theirs.get(f"{kind}_ms", {}).get(str(point[key]))
                    rows.setdefault(label.format(point[key]) + ", ms", {})[name] = (point["ms"], point["floor_ms"], other)
        if load := parts.get("throughput"):
            rows.setdefault("mixed load, output tokens/s", {})[name] = (
                load["output_tokens_per_second"], load["floor_output_tokens_per_second"], theirs.get("output_tokens_per_second"))  # fmt: skip
        if start := parts.get("startup"):
            rows.setdefault("process start to first token, s", {})[name] = (start["seconds"]["first_token"], None, theirs.get("first_token_seconds"))
        for kind, label in (("measured", "compile, every kernel measured, s"), ("table", "compile with the tuning table, s")):
            if built := parts.get("compile", {}).get(kind):
                rows.setdefault(label, {})[name] = (built["process_seconds"], None, None)
    head = ["", *(cell for name in models for cell in (name, "floor", "vLLM"))]
    lines = [head, ["---"] * len(head)]
    for label, cells in rows.items():
        lines.append([label, *(_number(v) for name in models for v in cells.get(name, (None, None, None)))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="*", metavar="CONFIG_DIR")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--flags", default="", help="more flags of `ingot compile`, in one string")
    parser.add_argument("--suffix", default="", help="what the models are called with these flags")
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("TMPDIR", "/tmp")) / "ingot-tables", help="where artifacts go")
    parser.add_argument("--show", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.show is not None:
        print(show(json.loads(args.show.read_text())))
        return
    target, begin = resolve("auto"), time.monotonic()
    path = args.results or HERE / "results" / f"{datetime.date.today()}-{slug(target.device)}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"device": target.device, "models": {}}
    for config in args.configs:
        name = config.name + (f"-{args.suffix}" if args.suffix else "")
        figures = results["models"].setdefault(name, {})
        for part in [p for p in args.parts.split(",") if p not in figures]:
            if time.monotonic() - begin > args.minutes * 60:
                print(f"{args.minutes:g} minutes are over: {name} {part} and what follows is left for the next run", file=sys.stderr)
                return
            print(f"{name}: {part}", file=sys.stderr, flush=True)
            figures[part] = run(part, config, shlex.split(args.flags), args.home / name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(show(results))


if __name__ == "__main__":
    main()
