"""Times every Triton candidate at the shapes of three models on this machine's GPU, beside the floor and PyTorch's libraries.

    python benchmarks/gpu_kernels.py results.json

Each figure is the median over graph replays of launches that rotate among input sets larger than the L2 cache. The floor
is the larger of the bytes that must move at READ_RATE and the operations at MATRIX_RATE, as measured on an H200.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from ingot.artifacts.gate import bind, relative
from ingot.compiler.codegen.emit import load_here
from ingot.compiler.measure import cuda_seconds
from ingot.ops import OPS
from ingot.ops import triton as families
from ingot.ops.dims import evaluate
from ingot.ops.kernel import CLAIMS, Call, Candidate, Steps, Tensor
from ingot.ops.target import Target, gpu

READ_RATE = 4.54e12  # bytes a second
PAGE = 64  # tokens of a KV page
MATRIX_RATE = 700e12  # bfloat16 operations a second, dense
CACHE_BYTES = 150e6  # more than twice the L2 cache
BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
T, S, S1, P, N = {"T": 1}, {"S": 1}, {"S": 1, "": 1}, {"P_full": 1}, {"N_full": 1}


def here() -> Target:
    """This machine's GPU."""
    target = gpu()
    assert target is not None, "no GPU is here"
    return target


@dataclass(frozen=True)
class Model:
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    qk_norm: bool
    head_dim: int = 128


MODELS = {
    "qwen3-0.6b": Model(1024, 16, 8, 3072, 151936, True),
    "llama-3.1-8b": Model(4096, 32, 8, 14336, 128256, False),
    "llama-3.2-1b": Model(2048, 32, 8, 8192, 128256, False, head_dim=64),
}


@dataclass
class Problem:
    """A call at one size; `library` computes it with PyTorch from the inputs."""

    model: str
    name: str
    call: Call
    steps: Steps
    sizes: dict[str, int]
    nbytes: float
    flops: float = 0.0
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    library: Callable[[dict[str, Any]], torch.Tensor] | None = None

    @property
    def floor(self) -> float:
        return max(self.nbytes / READ_RATE, self.flops / MATRIX_RATE)

    def candidates(self) -> list[Candidate]:
        return [c for claim in CLAIMS[self.call.op, "triton"] for c in claim(self.call, self.steps, here())]

    def inputs(self, seed: int) -> dict[str, Any]:
        generator = torch.Generator("cuda").manual_seed(seed)
        made: dict[str, Any] = {}
        for name, arg in self.call.args.items():
            if isinstance(arg, Tensor) and name not in self.values:
                shape = [evaluate(d, self.sizes) for d in arg.shape]
                made[name] = torch.randn(shape, generator=generator, device="cuda", dtype=arg.dtype)
                if name == "weight":
                    made[name] *= shape[-1] ** -0.5
            else:
                made[name] = self.values.get(name, arg)
        return made


def linear(model: str, name: str, op: str, rows: int, k: int, n: int) -> Problem:
    wide = 2 * n if op == "linear_glu" else n
    out = Tensor(BF16, (T, n))
    args: dict[str, Any] = {"x": Tensor(BF16, (T, k)), "weight": Tensor(BF16, (wide, k))}
    args |= {"act": "silu"} if op == "linear_glu" else {"bias": None} | ({"residual": out} if op == "linear_add" else {})
    steps = Steps(rows, rows, 1, rows, True) if rows <= 256 else Steps(rows, 64, rows, 64, False)
    nbytes = 2 * (wide * k + rows * (k + n) + (rows * n if op == "linear_add" else 0))
    library = {
        "linear": lambda i: F.linear(i["x"], i["weight"]),
        "linear_add": lambda i: torch.addmm(i["residual"], i["x"], i["weight"].t()),
        "linear_glu": lambda i: F.linear(i["x"], i["weight"]),  # without the activation
    }[op]
    return Problem(model, name, Call(op, args, (out,)), steps, {"T": rows}, nbytes, 2.0 * rows * wide * k, library=library)


def batch(seqs: int, new: int, context: int, longest: int = 0) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """`seqs` sequences with `new` new tokens each that end at `context`, the first at `longest` if that is given, on shuffled pages."""
    lens = torch.tensor([longest or context] + [context] * (seqs - 1))
    held = (lens + PAGE - 1) // PAGE
    width, count = int(held.max()), int(held.sum())
    pages = torch.zeros(seqs, width, dtype=torch.long)
    pages[torch.arange(width) < held[:, None]] = torch.randperm(count)
    place = lens[:, None] - new + torch.arange(new)
    slots = (pages.gather(1, place // PAGE) * PAGE + place % PAGE).flatten()
    values = {"cu_seqlens_q": torch.arange(seqs + 1) * new, "seq_lens": lens, "page_table": pages, "slot_mapping": slots}
    sizes = {"T": seqs * new, "S": seqs, "P_full": width, "N_full": count}
    return sizes, {n: v.to(I32).cuda() for n, v in values.items()}


def attention(model: str, m: Model, seqs: int, new: int, context: int) -> Problem:
    sizes, values = batch(seqs, new, context)
    cache = Tensor(BF16, (N, m.kv_heads, PAGE, m.head_dim))
    q = Tensor(BF16, (T, m.heads, m.head_dim))
    args = {"q": q, "k_cache": cache, "v_cache": cache, "cu_seqlens_q": Tensor(I32, (S1,)), "seq_lens": Tensor(I32, (S,)), "page_table": Tensor(I32, (S, P)),
            "sinks": None, "alibi_slopes": None, "scale": m.head_dim**-0.5, "window": 0, "chunk": 0, "softcap": 0.0,
            "k_scale": None, "v_scale": None}  # fmt: skip
    steps = Steps(seqs, seqs, 1, seqs, True) if new == 1 else Steps(seqs * new, 64, seqs * new, 64, False)
    nbytes = 2.0 * m.head_dim * (2 * seqs * context * m.kv_heads + 2 * seqs * new * m.heads)
    flops = 4.0 * m.head_dim * m.heads * seqs * sum(range(context - new + 1, context + 1))

    def library(i: dict[str, Any]) -> torch.Tensor:
        """Dense attention over keys that lie in order: what the pages cost is not in it, gathering them is."""
        k, v = (c[i["page_table"].long()].transpose(2, 3).reshape(seqs, context, m.kv_heads, m.head_dim).transpose(1, 2) for c in (i["k_cache"], i["v_cache"]))
        queries = i["q"].view(seqs, new, m.heads, m.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, k, v, is_causal=new > 1, enable_gqa=True)
        return out.transpose(1, 2).reshape(seqs * new, m.heads, m.head_dim)

    return Problem(model, f"attention {seqs}x{new}@{context}", Call("paged_attention", args, (q,)), steps, sizes, nbytes, flops, values, library)


def decode_attention(model: str, m: Model, seqs: int, context: int, longest: int = 0) -> Problem:
    """A decode step's attention with all that goes before it: head norms, rotation, the new key and value into their page. One sequence may be longer."""
    sizes, values = batch(seqs, 1, context, longest)
    cache, table = Tensor(BF16, (N, m.kv_heads, PAGE, m.head_dim)), Tensor(F32, (T, m.head_dim))
    head = Tensor(BF16, (m.head_dim,)) if m.qk_norm else None
    args = {"qkv": Tensor(BF16, (T, (m.heads + 2 * m.kv_heads) * m.head_dim)), "cos": table, "sin": table, "q_weight": head, "k_weight": head,
            "k_cache": cache, "v_cache": cache, "slot_mapping": Tensor(I32, (T,)), "cu_seqlens_q": Tensor(I32, (S1,)), "seq_lens": Tensor(I32, (S,)),
            "page_table": Tensor(I32, (S, P)), "sinks": None, "num_heads": m.heads, "num_kv_heads": m.kv_heads, "style": "neox", "eps": 1e-6, "offset": 0.0,
            "scale": m.head_dim**-0.5, "window": 0, "chunk": 0, "softcap": 0.0, "k_scale": None, "v_scale": None, "k_static": None,
            "v_static": None}  # fmt: skip
    keys = seqs * context + max(longest - context, 0)
    nbytes = 2.0 * m.head_dim * (2 * (keys + seqs) * m.kv_heads + 2 * seqs * m.heads)
    call = Call("qkv_attention", args, (Tensor(BF16, (T, m.heads, m.head_dim)),))
    name = f"decode {seqs}@{context}" + (f", one@{longest}" if longest else "")
    return Problem(model, name, call, Steps(seqs, seqs, 1, seqs, True), sizes, nbytes, values=values)


LATENT_HEADS = {"deepseek-v2-lite": 16, "deepseek-v3": 128}


def latent_attention(model: str, heads: int, seqs: int, new: int, context: int) -> Problem:
    """Over latents of 512 and rotated keys of 64, read once for all heads."""
    sizes, values = batch(seqs, new, context)
    latent, rope = Tensor(BF16, (T, heads, 512)), Tensor(BF16, (T, heads, 64))
    args = {"q_latent": latent, "q_rope": rope, "latent_cache": Tensor(BF16, (N, 1, PAGE, 576)), "cu_seqlens_q": Tensor(I32, (S1,)),
            "seq_lens": Tensor(I32, (S,)), "page_table": Tensor(I32, (S, P)), "indices": None, "sinks": None, "scale": 192**-0.5, "window": 0}  # fmt: skip
    steps = Steps(seqs, seqs, 1, seqs, True) if new == 1 else Steps(seqs * new, 64, seqs * new, 64, False)
    nbytes = 2.0 * (576 * seqs * context + (576 + 512) * seqs * new * heads)
    flops = 2.0 * (576 + 512) * heads * seqs * sum(range(context - new + 1, context + 1))
    return Problem(model, f"latent {seqs}x{new}@{context}", Call("mla_attention", args, (latent,)), steps, sizes, nbytes, flops, values)


def problems() -> list[Problem]:
    found = [
        latent_attention(name, heads, seqs, new, context)
        for name, heads in LATENT_HEADS.items()
        for seqs, new, context in ((1, 1, 4096), (1, 1, 32768), (64, 1, 1024), (64, 1, 4096), (1, 2048, 2048))
    ]
    for name, m in MODELS.items():
        q, kv, d = m.heads * m.head_dim, m.kv_heads * m.head_dim, m.hidden
        for rows in (1, 16, 64, 256, 2048):
            steps = Steps(rows, rows, 1, rows, True)
            x, w = Tensor(BF16, (T, d)), Tensor(BF16, (d,))
            found += [
                linear(name, f"qkv {rows}", "linear", rows, d, q + 2 * kv),
                linear(name, f"o {rows}", "linear_add", rows, q, d),
                linear(name, f"gate_up {rows}", "linear_glu", rows, d, m.intermediate),
                linear(name, f"down {rows}", "linear_add", rows, m.intermediate, d),
                Problem(name, f"add_norm {rows}", Call("add_rms_norm", {"x": x, "residual": x, "weight": w, "eps": 1e-6, "offset": 0.0}, (x, x)), steps,
                        {"T": rows}, 8.0 * rows * d),
            ]  # fmt: skip
            sizes, values = batch(rows, 1, 16)
            table, head = Tensor(F32, (T, m.head_dim)), Tensor(BF16, (m.head_dim,)) if m.qk_norm else None
            cache = Tensor(BF16, (N, m.kv_heads, PAGE, m.head_dim))
            args = {"qkv": Tensor(BF16, (T, q + 2 * kv)), "cos": table, "sin": table, "q_weight": head, "k_weight": head, "k_cache": cache, "v_cache": cache,
                    "slot_mapping": Tensor(I32, (T,)), "num_heads": m.heads, "num_kv_heads": m.kv_heads,
                    "style": "neox", "eps": 1e-6, "offset": 0.0, "k_scale": None, "v_scale": None, "k_static": None, "v_static": None}  # fmt: skip
            call = Call("qkv_rope_kv_write", args, (Tensor(BF16, (T, m.heads, m.head_dim)),))
            found.append(Problem(name, f"rope_kv {rows}", call, steps, sizes, 4.0 * rows * (q + 2 * kv), values=values))
        found += [linear(name, f"lm_head {rows}", "linear", rows, d, m.vocab) for rows in (1, 64)]
        found += [attention(name, m, 1, 1, 1024), attention(name, m, 64, 1, 1024), attention(name, m, 1, 1024, 1024), attention(name, m, 1, 8192, 8192)]
        found += [decode_attention(name, m, seqs, context) for seqs in (1, 16, 64, 256) for context in (160, 1024)]
        found += [decode_attention(name, m, seqs, 160, longest=16384) for seqs in (16, 256)]
    return found


def measure(problem: Problem, kernels: dict[Any, Any]) -> dict[str, Any]:
    copies = int(min(max(CACHE_BYTES / problem.nbytes, 1), 64)) + 1
    sets = [problem.inputs(seed) for seed in range(copies)]
    rounds = [sets[i % copies] for i in range(max(copies, 10 if problem.floor < 1e-3 else 3))]
    spec = OPS[problem.call.op]
    state = {n: sets[0][n].clone() for n in spec.states if sets[0][n] is not None}
    expected = spec.reference(*sets[0].values()) if problem.flops < 2e12 and "8192" not in problem.name else problem.library(sets[0])  # type: ignore[misc]
    expected = expected if isinstance(expected, tuple) else (expected,)
    for n, before in state.items():
        sets[0][n].copy_(before)
    figures, errors = {}, {}
    for candidate in problem.candidates():
        loaded = [kernels[launch.source] for launch in candidate.launches]
        outputs, run = bind(candidate, problem.call, sets[0], problem.sizes, loaded)
        run()
        errors[candidate.name] = max(relative(a, b) for a, b in zip(outputs, expected, strict=True))
        figures[candidate.name] = 1e6 * cuda_seconds([bind(candidate, problem.call, inputs, problem.sizes, loaded)[1] for inputs in rounds])
    best = min(figures, key=figures.__getitem__)
    library = None if problem.library is None else 1e6 * cuda_seconds([partial(problem.library, i) for i in rounds])
    return {
        "model": problem.model, "problem": problem.name, "best": best, "us": round(figures[best], 2), "floor_us": round(problem.floor * 1e6, 2),
        "tb_per_s": round(problem.nbytes / figures[best] / 1e6, 3), "tflops": round(problem.flops / figures[best] / 1e6, 1),
        "library_us": library and round(library, 2), "error": max(errors.values()), "candidates": {n: round(t, 2) for n, t in figures.items()},
    }  # fmt: skip


def main(path: Path, wanted: str = "") -> None:
    families.load()
    todo = [p for p in problems() if wanted in f"{p.model} {p.name}"]
    sources = list({launch.source: None for p in todo for c in p.candidates() for launch in c.launches})
    kernels = load_here(sources, here())
    print(f"{len(kernels)} kernels compiled")
    results = []
    for problem in todo:
        r = measure(problem, kernels)
        results.append(r)
        torch.cuda.empty_cache()
        print(f"{r['model']:13} {r['problem']:22} {r['us']:9.2f} µs  floor {r['floor_us']:8.2f}  library {r['library_us'] or 0:9.2f}  "
              f"{r['tb_per_s']:6.3f} TB/s {r['tflops']:6.1f} TFLOP/s  error {r['error']:.0e}  {r['best']}", flush=True)  # fmt: skip
    facts = {"date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    path.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
