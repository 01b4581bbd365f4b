"""The decode linears of a model on this CPU: GB/s of weights, beside the bandwidth that a plain read of memory reaches.

    python benchmarks/cpu_kernels.py --config DIR_OR_JSON [--rows 1] [--threads N] [--quantize int4-g128] > result.json

Weights are rotated through 256 MB, so that no cache holds them. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ingot.artifacts.settings import settings
from ingot.compiler.codegen.emit import load_here
from ingot.compiler.quantization import Request, choose_online
from ingot.ops import formats, tvm
from ingot.ops.dims import evaluate
from ingot.ops.kernel import CLAIMS, Call, Operand, Source, Steps, Tensor
from ingot.ops.random_inputs import random_inputs
from ingot.ops.target import host
from ingot.ops.tvm.vector import Vectors

ROTATED_BYTES = 256 << 20


def shapes(config: dict[str, Any]) -> dict[str, tuple[str, int, int]]:
    """The linears of a layer and the head, as the compiler fuses them: name → (op, N, K)."""
    d, i = config["hidden_size"], config["intermediate_size"]
    e = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * e, config["num_key_value_heads"] * e
    return {
        "qkv_proj": ("linear", q + 2 * kv, d),
        "o_proj": ("linear_add", d, q),
        "gate_up_proj": ("linear_glu", 2 * i, d),
        "down_proj": ("linear_add", d, i),
        "lm_head": ("linear", config["vocab_size"], d),
    }


def call(op: str, n: int, k: int, dtype: torch.dtype) -> Call:
    columns = n // 2 if op == "linear_glu" else n
    result = Tensor(dtype, ({"T": 1}, columns))
    extra: dict[str, dict[str, Any]] = {"linear": {"bias": None}, "linear_add": {"bias": None, "residual": result}, "linear_glu": {"act": "silu"}}
    return Call(op, {"x": Tensor(dtype, ({"T": 1}, k)), "weight": Tensor(dtype, (n, k)), **extra[op]}, (result,))


def quantized(plain: Call, method: str, is_head: bool) -> Call:
    """The same product with its weight in the format that `--quantize` gives it."""
    chosen = choose_online(Request(method), host())("lm_head.weight" if is_head else "weight", is_head)
    assert chosen is not None
    form, (n, k), act = formats.get(chosen[0]), plain.args["weight"].shape, plain.args.get("act")
    weight = torch.empty(n, k, dtype=plain.args["x"].dtype, device="meta")
    parts = formats.packed(form.quantize(weight), form.name, form.layout(host()), 2 if act else 1)
    tensors = {name: Tensor(p.dtype, tuple(p.shape)) for name, p in parts.items()}
    args = {"x": plain.args["x"], "weight": None, "scale": None, "zero": None, **tensors, "input_scale": None, "bias": None}
    args |= {"residual": plain.args.get("residual"), "act": act, "format": form.name, "layout": form.layout(host()), "activation": chosen[1], "n": n}
    return Call("quantized_linear", args | {"norm_weight": None, "eps": None, "offset": 0.0}, plain.results)


def read_source() -> Source:
    """Reads an array and keeps one sum of each 4 KB."""
    v = Vectors(host())
    body = f"""
for block in T.parallel(size // 1024):
    total = T.alloc_buffer((4,), "{v.type}", scope="global")
    for i in T.unroll(4):
        total[i] = {v.splat(0.0)}
    for k in T.serial({256 // v.lanes}):
        for i in T.unroll(4):
            total[i] = total[i] + {v.load("float32", f"x[block * 1024 + (k * 4 + i) * {v.lanes}]")}
    y[block] = {v.sum("total[0] + total[1] + total[2] + total[3]")}
"""
    return Source("read", "tvm", "read", v.script("read", [("x", "float32", ("size",)), ("y", "float32", ("sums",))], body))


def seconds(runs: list[Callable[[], None]], repetitions: int = 9) -> float:
    """Median time of one of `runs`, which are called in turn."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for run in runs:
            run()
        times.append((time.perf_counter() - start) / len(runs))
    return statistics.median(times)


def measure(config: dict[str, Any], rows: int, dtype: torch.dtype, method: str) -> dict[str, Any]:
    steps = Steps(rows, rows, 1, rows, False)
    calls = {name: call(*shape, dtype) for name, shape in shapes(config).items()}
    if method != "none":
        calls = {name: quantized(c, method, name == "lm_head") for name, c in calls.items()}
    candidates = {name: CLAIMS[c.op, "tvm"][0](c, steps, host())[0] for name, c in calls.items()}
    read = read_source()
    kernels = load_here([read, *(launch.source for c in candidates.values() for launch in c.launches)], host())

    array = torch.ones(ROTATED_BYTES // 4)
    bandwidth = ROTATED_BYTES / seconds([kernels[read].bind([array, torch.empty(len(array) // 1024)], ())]) / 1e9
    result: dict[str, Any] = {"device": host().device, "threads": torch.get_num_threads(), "rows": rows, "read_gb_per_s": round(bandwidth, 1)}
    total = 0.0
    for name, candidate in candidates.items():
        c = calls[name]
        fixed = random_inputs(c, steps, {"T": rows, "S": rows, "R": rows}, "cpu", 0)
        stored = {a: t for a, t in fixed.items() if a in ("weight", "scale", "zero") and t is not None}
        nbytes = sum(t.nbytes for t in stored.values())
        copies = [{a: t.clone() for a, t in stored.items()} for _ in range(max(1, ROTATED_BYTES // nbytes))]
        scratch = [torch.empty([evaluate(d, {"T": rows}) for d in t.shape], dtype=t.dtype) for t in candidate.scratch]
        out = torch.empty([evaluate(d, {"T": rows}) for d in c.results[0].shape], dtype=dtype)
        values = dict(fixed) | {f"scratch {i}": t for i, t in enumerate(scratch)} | {"out": out}
        bound = [[kernels[launch.source].bind([(values | copy)[_name(o)] for o in launch.operands], ()) for launch in candidate.launches] for copy in copies]
        elapsed = seconds([lambda calls=calls: [run() for run in calls] for calls in bound])  # type: ignore[misc]
        total += elapsed * (1 if name == "lm_head" else config["num_hidden_layers"])
        rate = nbytes / elapsed / 1e9
        result[name] = {
            "shape": [c.results[0].shape[1], c.args["x"].shape[1]],
            "us": round(elapsed * 1e6, 1),
            "gb_per_s": round(rate, 1),
            "of_read": round(rate / bandwidth, 3),
        }
    return result | {"all_linears_ms": round(total * 1e3, 2)}


def _name(operand: Operand) -> str:
    return operand.arg if operand.arg is not None else "out" if operand.scratch is None else f"scratch {operand.scratch}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a model's config.json, or its folder")
    parser.add_argument("--rows", type=int, default=1, help="tokens of a step, at most 16 without --quantize")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--quantize", default="none", help="as for ingot compile")
    parser.add_argument("--threads", type=int, default=settings().num_threads)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tvm.load()
    path = options.config / "config.json" if options.config.is_dir() else options.config
    print(json.dumps(measure(json.loads(path.read_text()), options.rows, getattr(torch, options.dtype), options.quantize), indent=1))


if __name__ == "__main__":
    main()
