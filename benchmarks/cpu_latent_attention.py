"""Latent attention on this CPU at the shape of DeepSeek-V2-Lite (16 heads, latents of 512, keys of 64): the kernel beside its reference and the floor of bytes.

    python benchmarks/cpu_latent_attention.py [--threads 1] > result.json

Milliseconds of this process's CPU time, medians of alternating runs, so that other work on the machine counts little. Caches are rotated through 128 MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_decode import read_bandwidth
from cpu_kernels import compiled

from ingot.ops import OPS, tvm
from ingot.ops.dims import evaluate
from ingot.ops.kernel import CLAIMS, Call, Steps, Tensor
from ingot.ops.target import host

H, L, R, PAGE = 16, 512, 64, 16
BF16, I32 = torch.bfloat16, torch.int32
STEPS = ((1, 1, 1024), (1, 1, 4096), (8, 1, 1024), (8, 1, 4096), (1, 512, 512))  # sequences, new tokens and cached ones, those included
ROTATED_BYTES = 128 << 20


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(seqs: int, new: int, context: int, bandwidth: float, folder: Path) -> dict[str, Any]:
    t, s = {"T": 1}, {"S": 1}
    batch = {"cu_seqlens_q": Tensor(I32, ({"S": 1, "": 1},)), "seq_lens": Tensor(I32, (s,)), "page_table": Tensor(I32, (s, {"P_latent": 1}))}
    args = {"q_latent": Tensor(BF16, (t, H, L)), "q_rope": Tensor(BF16, (t, H, R)), "latent_cache": Tensor(BF16, ({"N_latent": 1}, 1, PAGE, L + R)), **batch}
    call = Call("mla_attention", {**args, "indices": None, "sinks": None, "scale": 192**-0.5, "window": 0}, (Tensor(BF16, (t, H, L)),))
    tokens, pages = seqs * new, -(-context // PAGE)
    most = next(n for n in (1, 4, 16, 2048) if tokens <= n)  # as compiler/variants.py divides steps
    [candidate] = CLAIMS[call.op, "tvm"][0](call, Steps(most, min(most, 16), most, min(most, 16), False), host())
    [kernel] = compiled([launch.source for launch in candidate.launches], folder)
    values = {
        "q_latent": torch.randn(tokens, H, L).to(BF16),
        "q_rope": torch.randn(tokens, H, R).to(BF16),
        "latent_cache": torch.randn(seqs * pages, 1, PAGE, L + R).to(BF16),
        "cu_seqlens_q": torch.arange(0, tokens + 1, new).to(I32),
        "seq_lens": torch.full((seqs,), context, dtype=I32),
        "page_table": torch.randperm(seqs * pages).view(seqs, pages).to(I32),
    }
    out, scratch = torch.empty(tokens, H, L, dtype=BF16), torch.empty([evaluate(d, {"T": tokens}) for d in candidate.scratch[0].shape])
    copies = [values["latent_cache"].clone() for _ in range(max(1, ROTATED_BYTES // values["latent_cache"].nbytes))]
    runs = [kernel.bind([*(values | {"latent_cache": c}).values(), scratch, out]) for c in copies]
    times: dict[str, list[float]] = {"kernel": [], "reference": []}
    for _ in range(5):
        times["kernel"].append(cpu_seconds(lambda: [run() for run in runs]) / len(runs))
        times["reference"].append(cpu_seconds(lambda: OPS[call.op].reference(*values.values(), None, None, 192**-0.5, 0)))
    ms = {f"{name}_ms": round(statistics.median(found) * 1e3, 3) for name, found in times.items()}
    flops = 2.0 * (2 * L + R) * H * seqs * sum(range(context - new + 1, context + 1))
    rate = round(flops / ms["kernel_ms"] / 1e6)
    return {"seqs": seqs, "new": new, "context": context, **ms, "floor_ms": round(2e3 * (L + R) * seqs * context / bandwidth, 3), "gflop_per_s": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    tvm.load()
    bandwidth = read_bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(*step, bandwidth, Path(folder)) for step in STEPS]
    print(json.dumps({"device": host().device, "threads": torch.get_num_threads(), "read_gb_per_s": round(bandwidth / 1e9, 1), "steps": found}, indent=1))


if __name__ == "__main__":
    main()
