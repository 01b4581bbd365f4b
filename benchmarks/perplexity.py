"""Perplexity of a model in each quantization, through the public engine, on text that neither training nor calibration saw. Prints a table.

    python benchmarks/perplexity.py [--model bundled] [--text FILE] [--calibrate FILE] [--context 1024] [--windows N] [--only int8,int4-g128-gptq] [--json]

By default the bundled model's held-out text, calibrated on sources of this Python's standard library that are not in it. A text is cut at
the end-of-text token and into windows of `--context` tokens; the mean is over all tokens but the first of each window.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from ingot.artifacts.artifact import Artifact
from ingot.compiler.build import CompileOptions, compile_model
from ingot.models.source import BUNDLED
from ingot.runtime.llm import LLM
from ingot.runtime.request import SamplingParams

CONFIGURATIONS: dict[str, dict[str, str]] = {
    "bf16": {},
    "fp8": {"quantize": "fp8"},
    "int8": {"quantize": "int8"},
    **{f"int4-g{g}{a}": {"quantize": f"int4-g{g}{a}"} for g in (32, 128) for a in ("", "-gptq", "-awq")},
    "kv fp8": {"kv_cache_dtype": "fp8"},
    "kv int8": {"kv_cache_dtype": "int8"},
}
END_OF_TEXT = "<|endoftext|>"


def standard_library(heldout: str) -> str:
    """Sources of this Python's standard library, without those that share many lines with the held-out text."""
    held = {line for line in heldout.splitlines() if len(line) > 24}
    texts = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if len(line) > 24]
        if sum(line in held for line in lines) < len(lines) / 10:
            texts.append(text)
    return END_OF_TEXT.join(texts)


def perplexity(llm: LLM, windows: list[list[int]]) -> float:
    outputs = llm.generate(windows, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    logprobs = [entry.logprob for output in outputs for entry in (output.prompt_logprobs or [])[1:] if entry is not None]
    return math.exp(-sum(logprobs) / len(logprobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--text", type=Path, default=BUNDLED / "heldout.txt")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, help="at most this many of the windows, evenly spread")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--only", help="configurations, with commas between")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(CONFIGURATIONS)
    text = args.text.read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        calibration = args.calibrate or Path(folder) / "calibration.txt"
        if args.calibrate is None:
            calibration.write_text(standard_library(text), encoding="utf-8")
        for name in wanted:
            start = time.perf_counter()
            options = CONFIGURATIONS[name]
            if name.endswith(("gptq", "awq")):
                options = options | {"calibrate": str(calibration)}
            built = compile_model(args.model, CompileOptions(target=args.target, dtype="bfloat16", max_num_seqs=8, **options))  # type: ignore[arg-type]
            llm = LLM(built.path, enable_prefix_caching=False)
            assert llm.engine.tokenizer is not None
            texts = [llm.engine.tokenizer.encode(END_OF_TEXT + t) for t in text.split(END_OF_TEXT)]
            size = args.context - 1
            windows = [w for ids in texts for i in range(0, len(ids), size) if len(w := ids[i : i + size]) > 1]
            value = perplexity(llm, windows[:: max(1, len(windows) // args.windows)] if args.windows else windows)
            nbytes = sum(w.nbytes for w in Artifact.open(built.path).manifest.weights)
            first = rows[0]["perplexity"] if rows else value
            rows.append({"weights": name, "perplexity": value, "of_first": value / first - 1, "mb": nbytes / 1e6, "seconds": time.perf_counter() - start})
            if not args.json:
                print(f"{name:16} {value:8.4f}  {(value / first - 1) * 100:+6.2f}%  {nbytes / 1e6:8.1f} MB  {time.perf_counter() - start:6.1f} s", flush=True)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
