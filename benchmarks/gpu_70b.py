"""A 70B model's shape on one GPU, quantized, with weights that the device draws from a seed: does it load, serve, and how fast is a token?

    python benchmarks/gpu_70b.py [fp8|int4-g128] [--kv-cache-dtype fp8] [-o results.json]

Prints the decode step at batch 1 beside its floor, the peak of anonymous host memory over compilation and serving (no model is ever
held there), and what the device's memory holds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ingot.artifacts.artifact import Artifact
from ingot.runtime.llm import LLM
from ingot.runtime.request import SamplingParams
from ingot.serve.bench import latency

CONFIG = Path(__file__).parent / "configs" / "llama-3.1-70b"


class AnonymousMemory:
    """The largest anonymous memory (RssAnon of /proc/PID/status) that a process had, in bytes, while this watched."""

    def __init__(self, pid: int | str) -> None:
        self.peak = 0
        self._status, self._stop = Path(f"/proc/{pid}/status"), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.peak

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            try:
                lines = self._status.read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                return  # the process has ended
            self.peak = max([self.peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])


def compile_artifact(quantize: str, kv_cache_dtype: str) -> tuple[Path, dict[str, Any]]:
    command = [sys.executable, "-m", "ingot.serve.cli", "compile", str(CONFIG), "--dummy-weights", "--quantize", quantize, "--kv-cache-dtype", kv_cache_dtype,
               "--max-num-seqs", "16", "--max-num-batched-tokens", "2048", "--json"]  # fmt: skip
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        memory = AnonymousMemory(process.pid)
        output = process.communicate()[0]
        peak = memory.stop()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    path = Path(json.loads(output)["path"])
    return path, {"compile_s": round(time.perf_counter() - begin, 1), "compile_anonymous_gb": round(peak / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("quantize", nargs="?", default="fp8", choices=["fp8", "int4-g128"])
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    path, result = compile_artifact(arguments.quantize, arguments.kv_cache_dtype)
    weights = Artifact.open(path).manifest.weights
    memory = AnonymousMemory("self")
    begin = time.perf_counter()
    llm = LLM(path)
    result |= {"load_s": round(time.perf_counter() - begin, 1), "context": llm.engine.max_model_len}
    outputs = llm.generate([[1, 2, 3], list(range(100, 400)), [7] * 40], SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True))
    free, total = torch.cuda.mem_get_info()
    result |= {
        "served_tokens": [len(o.outputs[0].token_ids) for o in outputs],
        "device": torch.cuda.get_device_name(),
        "device_gb": round((total - free) / 1e9, 1),
        "weights_gb": round(sum(torch.empty(w.shape, dtype=getattr(torch, w.dtype), device="meta").nbytes for w in weights) / 1e9, 1),
    }
    del llm, outputs
    torch.cuda.empty_cache()
    figures = latency.run(path, [1, 16], [], 3, lambda stage, done: None)
    result |= {"quantize": arguments.quantize, "decode": figures["decode"], "serve_anonymous_gb": round(memory.stop() / 1e9, 2)}
    print(json.dumps(result, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
