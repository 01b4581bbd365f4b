"""Times the kernels of quantized weights and KV caches at the shapes of llama-3.1-8b on this machine's GPU, every candidate, beside the floor.

    python benchmarks/gpu_quantized.py results.json [--only 'int4 16'] [--seconds 480]

As `gpu_kernels.py` measures. The floor is that of bytes, or of operations at the rate of their kind; the same products and caches in bfloat16 are
among the problems. `--only`: problems whose name has these words, of a kind (int4, fp8, bf16, …, kv), a product (qkv, o, gate_up, down) and a number of
rows. What the file has already is not measured again, and a run ends in time, so that a few short ones make a whole: run it until it says that nothing is left.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import BF16, CACHE_BYTES, F32, I32, MATRIX_RATE, MODELS, PAGE, READ_RATE, S1, N, P, S, T, batch, here

import ingot.ops.library  # noqa: F401  (a claimant too)
from ingot.artifacts.gate import bind, relative, states
from ingot.compiler.codegen.emit import load_here
from ingot.compiler.measure import cuda_seconds
from ingot.ops import OPS, formats
from ingot.ops import triton as families
from ingot.ops.dims import evaluate
from ingot.ops.dummy import generate
from ingot.ops.kernel import Call, Candidate, Steps, Tensor, claimants
from ingot.ops.quantize import LARGEST
from ingot.ops.target import Target

MODEL = MODELS["llama-3.1-8b"]
WEIGHTS: dict[str, tuple[str, str] | None] = {
    "bf16": None,
    "int4": ("int4_group128", "none"), "fp8": ("fp8_e4m3_channel", "fp8_e4m3_token"), "int8": ("int8_channel", "int8_token"),
    "w8a16": ("int8_channel", "none"), "fp8block": ("fp8_e4m3_block128", "fp8_e4m3_group128"),
}  # fmt: skip
ROWS = (1, 4, 16, 64, 256, 1024, 8192)
AT_ONCE = 8
"""Problems whose kernels are compiled together."""


Problem = tuple[str, Call, Steps, dict[str, Any], dict[str, int]]
"""Its name, a call, its steps, and of its inputs those that are not random, and sizes."""


def linear(kind: str, name: str, rows: int, k: int, n: int, act: str | None, residual: bool) -> Problem:
    """As in the model: what has no residual has a norm before it."""
    x, out = Tensor(BF16, (T, k)), Tensor(BF16, (T, n // 2 if act else n))
    steps = Steps(rows, rows, 1, rows, True) if rows <= 256 else Steps(rows, 64, rows, 64, False)
    norm = {"norm_weight": Tensor(BF16, (k,)), "eps": 1e-5, "offset": 0.0}
    stored = WEIGHTS[kind]
    if stored is None:
        weight = {"weight": Tensor(BF16, (n, k)), **({"act": act} if act else {"bias": None})}
        if residual:
            call = Call("linear_add", {"x": x, **weight, "residual": out}, (out,))
        else:
            args = {"x": x, "norm_weight": norm["norm_weight"], **weight, "eps": norm["eps"], "offset": norm["offset"]}
            call = Call("rms_norm_linear_glu" if act else "rms_norm_linear", args, (out,))
        return f"{kind} {name} {rows}", call, steps, {}, {"T": rows}
    form, activation = stored
    plain = formats.get(form).quantize(torch.empty(n, k, dtype=BF16, device="meta"))
    layout = formats.get(form).layout(Target("cuda", "sm_90", ""))
    parts = {p: Tensor(t.dtype, tuple(t.shape)) for p, t in formats.packed(plain, form, layout, 2 if act else 1).items()}
    args = {"x": x, "weight": parts["weight"], "scale": parts["scale"], "zero": parts.get("zero"), "input_scale": None, "bias": None,
            "residual": out if residual else None, "act": act, "format": form, "layout": layout, "activation": activation, "n": n,
            **(dict.fromkeys(norm) | {"offset": 0.0} if residual else norm)}  # fmt: skip
    return f"{kind} {name} {rows}", Call("quantized_linear", args, (out,)), steps, {}, {"T": rows}


def attention(dtype: torch.dtype, seqs: int, context: int) -> Problem:
    """A decode step's attention, rotation and write included."""
    m = MODEL
    sizes, values = batch(seqs, 1, context)
    table, cache = Tensor(F32, (T, m.head_dim)), Tensor(dtype, (N, m.kv_heads, PAGE, m.head_dim))
    scale = Tensor(F32, (N, m.kv_heads, PAGE)) if dtype in LARGEST else None
    args = {"qkv": Tensor(BF16, (T, (m.heads + 2 * m.kv_heads) * m.head_dim)), "cos": table, "sin": table, "q_weight": None, "k_weight": None,
            "k_cache": cache, "v_cache": cache, "slot_mapping": Tensor(I32, (T,)), "cu_seqlens_q": Tensor(I32, (S1,)), "seq_lens": Tensor(I32, (S,)),
            "page_table": Tensor(I32, (S, P)), "sinks": None, "num_heads": m.heads, "num_kv_heads": m.kv_heads, "style": "neox", "eps": 0.0, "offset": 0.0,
            "scale": m.head_dim**-0.5, "window": 0, "chunk": 0, "softcap": 0.0, "k_scale": scale, "v_scale": scale, "k_static": None,
            "v_static": None}  # fmt: skip
    call = Call("qkv_attention", args, (Tensor(BF16, (T, m.heads, m.head_dim)),))
    return f"kv {str(dtype).removeprefix('torch.')} {seqs}@{context}", call, Steps(seqs, seqs, 1, seqs, True, PAGE), values, sizes


def products(kind: str, rows: int) -> list[Problem]:
    """A layer's, in their order."""
    m = MODEL
    q, kv, d = m.heads * m.head_dim, m.kv_heads * m.head_dim, m.hidden
    shapes = [
        ("qkv", d, q + 2 * kv, None, False),
        ("o", q, d, None, True),
        ("gate_up", d, 2 * m.intermediate, "silu", False),
        ("down", m.intermediate, d, None, True),
    ]
    return [linear(kind, name, rows, k, n, act, residual) for name, k, n, act, residual in shapes]


def problems() -> list[Problem]:
    found = [p for kind in WEIGHTS for rows in ROWS for p in products(kind, rows)]
    return found + [attention(dtype, *shape) for shape in ((32, 8192), (64, 1024), (1, 8192)) for dtype in (BF16, torch.float8_e4m3fn, torch.int8)]


def inputs(call: Call, values: dict[str, Any], sizes: dict[str, int], seed: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for i, (name, arg) in enumerate(call.args.items()):
        if name in values or not isinstance(arg, Tensor):
            made[name] = values.get(name, arg)
            continue
        shape = tuple(evaluate(dim, sizes) for dim in arg.shape)
        mean, std = 0.0, 1.0
        if call.op == "quantized_linear" and arg.dtype.is_floating_point and name in ("weight", "scale", "zero"):
            mean, std = formats.get(call.args["format"]).moments(name, call.args["x"].shape[1])
        elif name in ("k_scale", "v_scale"):
            mean, std = 1 / 64, 1 / 512
        elif name == "weight":
            std = shape[-1] ** -0.5
        made[name] = generate(100 * seed + i, mean, std, shape, arg.dtype, "cuda")
    return made


def nbytes(values: dict[str, Any], outputs: list[torch.Tensor]) -> float:
    return float(sum(t.numel() * t.itemsize for t in (*values.values(), *outputs) if isinstance(t, torch.Tensor)))


def measure(
    name: str, call: Call, steps: Steps, values: dict[str, Any], sizes: dict[str, int], found: list[Candidate], kernels: dict[Any, Any]
) -> dict[str, Any]:
    first = inputs(call, values, sizes, 0)
    size = nbytes(first, [])
    copies = int(min(max(CACHE_BYTES / size, 1), 64)) + 1
    sets = [first, *(inputs(call, values, sizes, seed) for seed in range(1, copies))]
    rounds = [sets[i % copies] for i in range(max(copies, 10))]
    before = {n: first[n].clone() for n in states(call)}
    expected = OPS[call.op].reference(*first.values()) if size < 1e9 else None
    for n, old in before.items():
        first[n].copy_(old)
    figures: dict[str, float] = {}
    errors: dict[str, float] = {}
    for candidate in found:
        loaded = [kernels.get(x.source) for x in candidate.launches]
        outputs, run = bind(candidate, call, first, sizes, loaded)
        run()
        if expected is not None:
            errors[candidate.name] = relative(outputs[0], expected)
        figures[candidate.name] = 1e6 * cuda_seconds([bind(candidate, call, i, sizes, loaded)[1] for i in rounds])
    weight = call.args.get("weight")
    flops = 2.0 * steps.max_tokens * weight.shape[0] * call.args["x"].shape[1] if weight is not None else 0.0
    rate = MATRIX_RATE * (1 if call.args.get("activation", "none") == "none" else 2)
    floor = max(size / READ_RATE, flops / rate) * 1e6
    order = sorted(figures, key=figures.__getitem__)
    best = figures[order[0]]
    print(f"{name:28} {best:8.2f} µs  floor {floor:8.2f}  {size / best / 1e6:6.3f} TB/s {flops / best / 1e6:7.1f} TFLOP/s  "
          f"error {max(errors.values(), default=float('nan')):.0e}  " + "  ".join(f"{n} {figures[n]:.1f}" for n in order[:5]), flush=True)  # fmt: skip
    return {"problem": name, "floor_us": round(floor, 2), "candidates": {n: round(figures[n], 2) for n in order}, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", default="", help="words of a problem's name")
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no more problems after so long")
    args = parser.parse_args()
    ends = time.monotonic() + args.seconds
    families.load()
    target, device = here(), torch.cuda.get_device_name()
    known: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {"device": device, "results": []}
    assert known["device"] == device, f"{args.results} is of a {known['device']}"
    done = {r["problem"] for r in known["results"]}
    todo = [p for p in problems() if p[0] not in done and all(w in p[0].split() for w in args.only.split())]
    left = len(todo)
    for some in (todo[i : i + AT_ONCE] for i in range(0, len(todo), AT_ONCE)):
        if time.monotonic() > ends:
            break
        candidates = [claimants(call, steps, target) for _, call, steps, *_ in some]
        sources = list({x.source: None for found in candidates for c in found for x in c.launches if x.source.backend == "triton"})
        kernels = load_here(sources, target)
        for problem, found in zip(some, candidates, strict=True):
            if time.monotonic() > ends:
                break
            known["results"].append(measure(*problem, found, kernels))
            args.results.write_text(json.dumps(known, indent=1) + "\n")
            left -= 1
            torch.cuda.empty_cache()
    print(f"{left} problems left")


if __name__ == "__main__":
    main()
