"""Every CPU kernel family against its op's reference, for each instruction set that this machine runs, at sizes that no vector width divides."""

from __future__ import annotations

import fcntl
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ingot.artifacts.launch_tvm import SharedObject, load
from ingot.artifacts.plan import Kernel
from ingot.compiler.codegen.tvm import compile_sources
from ingot.ops import OPS, formats, tvm
from ingot.ops.dims import evaluate
from ingot.ops.glu import ACTIVATIONS
from ingot.ops.kernel import CLAIMS, Call, Candidate, Operand, Steps, Tensor
from ingot.ops.random_inputs import RANGES
from ingot.ops.rotary import STYLES
from ingot.ops.target import Target, host

tvm.load()

F32, BF16, F16, I32, I64 = torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64
TOLERANCE = {F32: 2e-5, BF16: 1e-2, F16: 2e-3}
"""Largest |out − ref| / (|ref| + rms(ref)), the reference in float32: the roundings of a result, and sums in another order."""
FEATURES = ("avx2+fma", "avx2+fma+avx512f+avx512bw+avx512vl", "avx2+fma+avx512f+avx512bw+avx512vl+avx512_vnni+avx512_bf16")
TARGETS = {f.rpartition("+")[2]: t for f in FEATURES if (t := Target("cpu", f"x86-64:{f}", "")).features <= host().features}

T, R, S, PAGES, SLOTS = {"T": 1}, {"R": 1}, {"S": 1}, {"N_full": 1}, {"N_slot": 1}
PREFILL, DECODE = Steps(64, 8, 64, 64, False), Steps(8, 8, 1, 8, False)
FEW, ONE = Steps(16, 16, 1, 16, False), Steps(1, 1, 1, 1, False)
NEW_TOKENS = {64: [[1, 0, 5, 17, 2], [40]], 16: [[3, 4]], 8: [[1, 1, 1]], 1: [[1]]}
"""Batches by `max_tokens`: the new tokens of each sequence. The last of several is a padding row, and tokens follow that no sequence has."""

Example = tuple[Steps, Call]
CASES: dict[str, list[Example]] = {}


def case(op: str, steps: Steps, args: dict[str, Any], *results: Tensor) -> None:
    CASES.setdefault(op, []).append((steps, Call(op, args, results)))


def rows(dtype: torch.dtype, *shape: int) -> Tensor:
    return Tensor(dtype, (T, *shape))


def weight(dtype: torch.dtype, *shape: int) -> Tensor:
    return Tensor(dtype, shape)


def _linears() -> None:
    for steps, dtype, n, k, bias in (
        (FEW, F32, 21, 75, True),
        (FEW, BF16, 37, 75, True),
        (FEW, F16, 8, 33, False),
        (FEW, BF16, 24, 64, False),
        (ONE, BF16, 3, 96, False),
    ):
        b = weight(dtype, n) if bias else None
        case("linear", steps, {"x": rows(dtype, k), "weight": weight(dtype, n, k), "bias": b}, rows(dtype, n))
        case("linear_add", steps, {"x": rows(dtype, k), "weight": weight(dtype, n, k), "bias": b, "residual": rows(dtype, n)}, rows(dtype, n))
    for dtype, i, act in ((F32, 13, "silu"), (BF16, 24, "gelu"), (F16, 5, "gelu_tanh"), (BF16, 13, "relu")):
        case("linear_glu", FEW, {"x": rows(dtype, 75), "weight": weight(dtype, 2 * i, 75), "act": act}, rows(dtype, i))
    wanted = Tensor(BF16, (R, 40))
    case("linear", Steps(64, 8, 64, 8, False), {"x": wanted, "weight": weight(BF16, 51, 40), "bias": None}, Tensor(BF16, (R, 51)))


def _quantized() -> None:
    """Groups that do not divide, tiles that are not full, both roundings of x, every epilogue."""
    for steps, dtype, name, activation, n, k, extra in (
        (FEW, F32, "int8_channel", "int8_token", 37, 75, "bias"),
        (FEW, BF16, "int4_group32", "int8_group32", 24, 300, "residual"),
        (PREFILL, BF16, "int4_group128", "int8_group128", 40, 256, "bias residual"),
        (PREFILL, F32, "int4_group64_zero", "int8_group64", 16, 200, ""),
        (ONE, BF16, "int8_group32_zero", "int8_token", 33, 96, ""),
        (FEW, F16, "int8_channel", "int8_group128", 26, 170, "silu"),
        (PREFILL, F32, "int4_channel", "int8_group32", 48, 75, "gelu"),
        (PREFILL, F32, "int4_group32", "int8_token", 66, 70, "silu"),
    ):
        act = extra if extra in ACTIVATIONS else None
        columns, form = n // 2 if act else n, formats.get(name)
        parts = formats.packed(form.quantize(torch.empty(n, k, dtype=dtype, device="meta")), name, "tile16", 2 if act else 1)
        args: dict[str, Any] = {"x": rows(dtype, k), "zero": None} | {p: weight(t.dtype, *t.shape) for p, t in parts.items()} | {"input_scale": None}
        args = {a: args[a] for a in ("x", "weight", "scale", "zero", "input_scale")}
        args |= {"bias": weight(dtype, n) if "bias" in extra else None, "residual": rows(dtype, n) if "residual" in extra else None, "act": act}
        unnormalized = {"norm_weight": None, "eps": None, "offset": 0.0}
        case("quantized_linear", steps, args | {"format": name, "layout": "tile16", "activation": activation, "n": n, **unnormalized}, rows(dtype, columns))


def _experts() -> None:
    """Every layout of rows, biases, experts without tokens; ids come from `_random`, some of them outside the table."""
    for steps, dtype, experts, n, k, bias, ids in ((PREFILL, F32, 3, 21, 75, True, I64), (FEW, BF16, 7, 24, 64, False, I32)):
        args = {"x": rows(dtype, k), "weight": weight(dtype, experts, n, k), "bias": weight(F32, experts, n) if bias else None}
        case("grouped_linear", steps, args | {"expert_ids": rows(ids), "transposed": False}, rows(dtype, n))
    for steps, dtype, experts, active, d, inner, act, gated, interleaved, bias in (
        (PREFILL, F32, 3, 2, 21, 13, "silu", True, False, True),
        (FEW, BF16, 7, 3, 40, 24, "gelu", True, True, True),
        (PREFILL, BF16, 2, 1, 64, 32, "gelu_tanh", True, False, False),
        (FEW, F16, 5, 4, 33, 10, "relu", False, False, True),
        (FEW, F32, 3, 2, 24, 11, "swiglu_oai", True, False, True),
    ):
        width = 2 * inner if gated else inner
        args = {"x": rows(dtype, d), "expert_ids": rows(I64, active), "expert_weights": rows(F32 if bias else dtype, active)}
        args |= {"w_in": weight(dtype, experts, width, d), "b_in": weight(dtype, experts, width) if bias else None}
        args |= {"w_out": weight(dtype, experts, d, inner), "b_out": weight(dtype, experts, d) if bias else None}
        case("moe", steps, args | {"act": act, "gated": gated, "transposed": False, "interleaved": interleaved}, rows(dtype, d))


def _quantized_experts() -> None:
    """Groups and tiles that are not full, experts in one tile or several, gate and up in tiles of their own."""
    for steps, dtype, name, activation, experts, active, d, inner, act, gated, bias in (
        (ONE, F32, "int8_channel", "int8_token", 3, 2, 21, 13, "silu", True, True),
        (FEW, BF16, "int4_group32_zero", "int8_group32", 5, 3, 40, 24, "swiglu_oai", True, False),
        (ONE, F32, "int4_group128", "int8_group128", 4, 2, 40, 150, "gelu", False, True),
    ):
        args = {"x": rows(dtype, d), "expert_ids": rows(I64, active), "expert_weights": rows(F32 if bias else dtype, active)}
        for side, n, k, pieces in (("in", 2 * inner if gated else inner, d, 2 if gated else 1), ("out", d, inner, 1)):
            parts = formats.packed(formats.get(name).quantize(torch.empty(n, k, dtype=dtype, device="meta")), name, "tile16", pieces)
            args |= {f"{p[0]}_{side}": weight(parts[p].dtype, experts, *parts[p].shape) if p in parts else None for p in ("weight", "scale", "zero")}
            args[f"b_{side}"] = weight(dtype, experts, n) if bias else None
        how = {"act": act, "gated": gated, "format": name, "layout": "tile16", "activation": activation, "inner": inner}
        case("quantized_moe", steps, args | how, rows(dtype, d))


def _routes() -> None:
    for dtype, shape, k, softmax, renormalize, scale, result in (
        (F32, (8,), 2, True, True, 1.0, F32),
        (BF16, (130,), 8, True, False, 1.0, BF16),
        (F32, (3, 5), 2, False, False, 1.0, F32),
        (F16, (37,), 3, True, True, 2.5, F16),
    ):
        args = {"logits": rows(dtype, *shape), "k": k, "softmax": softmax, "renormalize": renormalize, "scale": scale, "dtype": result}
        case("route", PREFILL, args, rows(result, *shape[:-1], k), rows(I64, *shape[:-1], k))


def _norms() -> None:
    for dtype, shape, w, offset in ((F32, (75,), F32, 1.0), (BF16, (3, 24), None, 0.0), (F16, (64,), F32, 0.0), (BF16, (1030,), BF16, 0.0)):
        args = {"weight": weight(w, shape[-1]) if w else None, "eps": 1e-5, "offset": offset}
        case("rms_norm", PREFILL, {"x": rows(dtype, *shape), **args}, rows(dtype, *shape))
        case("add_rms_norm", PREFILL, {"x": rows(dtype, *shape), "residual": rows(dtype, *shape), **args}, rows(dtype, *shape), rows(dtype, *shape))


def _gated_norms() -> None:
    for dtype, shape, w, group, act, first in (
        (F32, (75,), F32, 0, "silu", True),
        (BF16, (2, 24), None, 12, "sigmoid", False),
        (F16, (64,), F16, 32, "silu", False),
    ):
        args = {"x": rows(dtype, *shape), "gate": rows(dtype, *shape), "weight": weight(w, shape[-1]) if w else None}
        case("rms_norm_gated", PREFILL, args | {"eps": 1e-5, "group": group, "act": act, "norm_first": first}, rows(dtype, *shape))


def _glus() -> None:
    for dtype, shape, act in zip((F32, BF16, F16, F32, BF16), ((75,), (3, 24), (5,), (64,), (1030,)), ACTIVATIONS, strict=True):
        case("glu", PREFILL, {"gate_up": rows(dtype, *shape[:-1], 2 * shape[-1]), "act": act}, rows(dtype, *shape))


def _tables() -> None:
    for dtype, index, width in ((F32, I32, 75), (BF16, I64, 640)):
        case("embedding", PREFILL, {"ids": rows(index), "weight": weight(dtype, 99, width)}, rows(dtype, width))
    for dtype, shape in ((BF16, (75,)), (F32, (3, 24))):
        case("gather_rows", PREFILL, {"x": rows(dtype, *shape), "rows": Tensor(I32, (R,))}, Tensor(dtype, (R, *shape)))


def _rotations() -> None:
    for half in (False, True):
        table = rows(F32, 12 if half else 24)
        case("rotary_embedding", PREFILL, {"positions": rows(I32), "inv_freq": weight(F32, 12), "scaling": 1.5, "half": half}, table, table)
    for style, dtype, e, r in zip(STYLES, (F32, BF16, F32, F32, BF16, F32, F32), (80, 24, 24, 128, 16, 80, 24), (80, 24, 20, 44, 16, 44, 24), strict=True):
        table = rows(dtype, r // 2 if style.endswith("_half") else r)
        case("rope", PREFILL, {"x": rows(dtype, 3, e), "cos": table, "sin": table, "style": style}, rows(dtype, 3, e))


def _caches(dtype: torch.dtype, heads: int, page_size: int, e: int, f: int) -> dict[str, Tensor]:
    return {"k_cache": Tensor(dtype, (PAGES, heads, page_size, e)), "v_cache": Tensor(dtype, (PAGES, heads, page_size, f))}


QUANTIZED = (torch.float8_e4m3fn, torch.int8)


def _scaled(cache: torch.dtype, heads: int, page_size: int, e: int, f: int, static: tuple[int, ...] = ()) -> dict[str, Any]:
    """Caches with scales; `static`: how many scales a calibrated checkpoint brings for k and v."""
    scale = Tensor(F32, (PAGES, heads, page_size))
    given = {n: weight(F32, size) for n, size in zip(("k_static", "v_static"), static, strict=False)}
    return {**_caches(cache, heads, page_size, e, f), "k_scale": scale, "v_scale": scale, "k_static": None, "v_static": None, **given}


def _writes() -> None:
    unscaled = dict.fromkeys(("k_scale", "v_scale", "k_static", "v_static"))
    for dtype, e, f, page_size in ((BF16, 24, 40, 16), (F32, 16, 16, 4)):
        args = {"k": rows(dtype, 2, e), "v": rows(dtype, 2, f), **_caches(dtype, 2, page_size, e, f), "slot_mapping": rows(I32)}
        case("kv_write", PREFILL, args | unscaled)
    for dtype, cache, e, f, static in ((BF16, QUANTIZED[0], 24, 40, ()), (F32, QUANTIZED[1], 16, 16, ()), (F16, QUANTIZED[0], 16, 24, (1, 3))):
        args = {"k": rows(dtype, 3, e), "v": rows(dtype, 3, f), **_caches(cache, 3, 16, e, f), "slot_mapping": rows(I32)}
        case("kv_write", PREFILL, args | _scaled(cache, 3, 16, e, f, static))
    shapes = ((BF16, 4, 2, 128, 128, "neox", BF16), (F32, 3, 1, 24, 16, "gptj", None), (F32, 2, 2, 80, 80, "neox_half", F32), (F16, 4, 4, 16, 24, "dsv3", None))
    for dtype, heads, kv_heads, e, f, style, norm in shapes:
        table = rows(F32, e // 2 if style.endswith("_half") else e - 8 if norm is None else e)
        head_weight = weight(norm, e) if norm else None
        args = {"qkv": rows(dtype, heads * e + kv_heads * (e + f)), "cos": table, "sin": table, "q_weight": head_weight, "k_weight": head_weight}
        args |= {**_caches(dtype, kv_heads, 16, e, f), "slot_mapping": rows(I32), "num_heads": heads, "num_kv_heads": kv_heads, "style": style}
        args |= {"eps": 1e-6, "offset": 1.0 if norm is F32 else 0.0} | unscaled
        case("qkv_rope_kv_write", PREFILL, args, rows(dtype, heads, e))
        if dtype is not F32:
            case("qkv_rope_kv_write", PREFILL, args | _scaled(QUANTIZED[norm is None], kv_heads, 16, e, f), rows(dtype, heads, e))


def _attention() -> None:
    shapes: tuple[tuple[Steps, torch.dtype, tuple[int, ...], int, dict[str, Any]], ...] = (
        (PREFILL, F32, (4, 2, 16, 16), 16, {}),
        (PREFILL, BF16, (4, 2, 128, 128), 16, {"window": 20}),
        (PREFILL, F32, (5, 1, 80, 24), 16, {"softcap": 3.0, "alibi_slopes": True}),
        (PREFILL, F16, (3, 3, 24, 64), 4, {"chunk": 24, "sinks": True}),
        (DECODE, BF16, (16, 1, 64, 80), 20, {"sinks": True}),
        (DECODE, F32, (4, 4, 24, 16), 16, {"window": 7, "chunk": 16, "softcap": 5.0}),
        (ONE, BF16, (4, 1, 128, 128), 16, {"alibi_slopes": True}),
    )
    for steps, dtype, (heads, kv_heads, e, f), page_size, options in shapes:
        args: dict[str, Any] = {"q": rows(dtype, heads, e), **_caches(dtype, kv_heads, page_size, e, f), "cu_seqlens_q": Tensor(I32, ({"S": 1, "": 1},))}
        args |= {"seq_lens": Tensor(I32, (S,)), "page_table": Tensor(I32, (S, {"P_full": 1})), "sinks": None, "alibi_slopes": None}
        args |= {"scale": e**-0.5, "window": 0, "chunk": 0, "softcap": 0.0, "k_scale": None, "v_scale": None}
        args |= {n: weight(F32, heads) if v is True else v for n, v in options.items()}
        case("paged_attention", steps, args, rows(dtype, heads, f))
        if "softcap" in options or steps is ONE:
            cache = QUANTIZED[steps is DECODE]
            scaled = {n: a for n, a in _scaled(cache, kv_heads, page_size, e, f).items() if not n.endswith("static")}
            case("paged_attention", steps, args | scaled, rows(dtype, heads, f))


BATCH = {"cu_seqlens_q": Tensor(I32, ({"S": 1, "": 1},)), "seq_lens": Tensor(I32, (S,)), "page_table": Tensor(I32, (S, {"P_full": 1}))}


def _latents() -> None:
    for steps, dtype, heads, o, k in ((ONE, BF16, 3, 40, 24), (FEW, F32, 2, 16, 75), (DECODE, F16, 5, 8, 64)):
        case("head_linear", steps, {"x": rows(dtype, heads, k), "weight": weight(dtype, heads, o, k)}, rows(dtype, heads, o))
    for dtype, size, r, page_size in ((BF16, 40, 24, 16), (F32, 75, 0, 4)):
        cache = Tensor(dtype, (PAGES, 1, page_size, size + r))
        case("latent_write", PREFILL, {"latent": rows(dtype, size), "rope": rows(dtype, r) if r else None, "latent_cache": cache, "slot_mapping": rows(I32)})
    for dtype, style, h, nope, r, size in ((BF16, "dsv3", 5, 24, 16, 40), (F32, "gptj_half", 4, 16, 8, 64), (F16, "neox", 3, 75, 24, 32)):
        table, width = rows(F32, r // 2 if style.endswith("_half") else r), h * (nope + r)
        args = {"q": rows(dtype, width + 3), "kv": rows(dtype, 8 + size + r), "cos": table, "sin": table, "weight": weight(dtype, size)}
        args |= {"latent_cache": Tensor(dtype, (PAGES, 1, 16, size + r)), "slot_mapping": rows(I32)}
        apart = {"straight": [0, nope], "turned": [h * nope, r]} if style == "neox" else {"straight": [3, nope + r], "turned": [3 + nope, nope + r]}
        args |= {**apart, "kv_begin": 8, "num_heads": h, "nope": nope, "style": style, "eps": 1e-6, "offset": 1.0 if style == "neox" else 0.0}
        case("latent_rope_write", PREFILL, args, rows(dtype, h, nope), rows(dtype, h, r))
    shapes: tuple[tuple[Steps, torch.dtype, int, int, int, int, int, dict[str, Any]], ...] = (
        (PREFILL, BF16, 16, 64, 32, 16, 0, {}),
        (PREFILL, F32, 5, 24, 8, 20, 0, {"window": 9, "sinks": True}),
        (DECODE, F16, 4, 40, 0, 4, 0, {}),
        (ONE, BF16, 3, 64, 16, 16, 0, {"sinks": True}),
        (PREFILL, F32, 6, 24, 8, 16, 40, {"window": 30, "sinks": True}),
        (DECODE, BF16, 8, 64, 0, 4, 40, {}),
    )
    for steps, dtype, heads, size, r, page_size, topk, options in shapes:
        args = {"q_latent": rows(dtype, heads, size), "q_rope": rows(dtype, heads, r), "latent_cache": Tensor(dtype, (PAGES, 1, page_size, size + r)), **BATCH}
        args |= {"indices": rows(I32, topk) if topk else None, "sinks": weight(F32, heads) if "sinks" in options else None, "scale": 0.2}
        case("mla_attention", steps, args | {"window": options.get("window", 0)}, rows(dtype, heads, size))
    for steps, dtype, j, d, page_size, topk in ((PREFILL, F32, 4, 24, 16, 5), (DECODE, BF16, 16, 64, 4, 20), (ONE, F16, 3, 40, 16, 100)):
        args = {"q": rows(dtype, j, d), "weights": rows(F32, j), "index_cache": Tensor(dtype, (PAGES, 1, page_size, d)), **BATCH, "topk": topk, "scale": 0.2}
        case("sparse_index", steps, args, rows(I32, topk))


def _pools() -> None:
    for dtype, width in ((F32, 75), (BF16, 64), (F16, 13)):
        args = {"x": rows(dtype, width), "cu_seqlens_q": Tensor(I32, ({"S": 1, "": 1},)), "pooling": Tensor(I32, (S,))}
        case("pool", PREFILL, args, Tensor(F32, (S, width)))


def _recurrences() -> None:
    """Convolutions of two and more tokens; rows of a state that are not as many as lanes, groups of heads, decay by head and by channel."""
    step: dict[str, Any] = {"cu_seqlens_q": Tensor(I32, ({"S": 1, "": 1},)), "seq_lens": Tensor(I32, (S,)), "state_slots": Tensor(I32, (S,))}
    for steps, dtype, c, w, bias, act in ((PREFILL, F32, 75, 4, True, "silu"), (PREFILL, BF16, 16, 2, False, ""), (DECODE, F16, 40, 3, True, "")):
        state = {"conv_state": Tensor(dtype, (SLOTS, c, w - 1))}
        args = {"x": rows(dtype, c), "weight": weight(dtype, c, w), "bias": weight(dtype, c) if bias else None, **state, **step, "act": act}
        case("causal_conv1d", steps, args, rows(dtype, c))
    for steps, dtype, (h, g, p, n), extra, limits in (
        (PREFILL, BF16, (4, 2, 32, 40), True, (0.0, math.inf)),
        (PREFILL, F32, (3, 1, 7, 16), False, (0.1, 0.8)),
        (DECODE, F16, (2, 2, 24, 128), True, (-math.inf, math.inf)),
    ):
        args = {"x": rows(dtype, h, p), "dt": rows(dtype, h), "A": weight(F32, h), "B": rows(dtype, g, n), "C": rows(dtype, g, n)}
        args |= {"D": weight(dtype, h) if extra else None, "dt_bias": weight(F32, h) if extra else None}
        args |= {"ssm_state": Tensor(F32, (SLOTS, h, p, n)), **step, "softplus": extra, "dt_min": limits[0], "dt_max": limits[1]}
        case("ssd_scan", steps, args, rows(F32, h, p))
    for steps, dtype, c, n, extra in ((PREFILL, F32, 48, 16, True), (PREFILL, BF16, 21, 5, True), (DECODE, BF16, 32, 16, False)):
        args = {"x": rows(dtype, c), "dt": rows(dtype, c), "A": weight(F32, c, n), "B": rows(dtype, n), "C": rows(dtype, n)}
        args |= {"D": weight(F32, c), "z": rows(dtype, c), "dt_bias": weight(F32, c)} if extra else dict.fromkeys(("D", "z", "dt_bias"))
        case("selective_scan", steps, args | {"ssm_state": Tensor(F32, (SLOTS, c, n)), **step, "softplus": extra}, rows(dtype, c))
    for steps, dtype, (k, h, e, f), channels, eps in (
        (PREFILL, F32, (2, 4, 24, 64), False, 1e-6),
        (PREFILL, BF16, (1, 3, 21, 21), True, 0.0),
        (DECODE, BF16, (2, 2, 64, 32), True, 1e-6),
    ):
        args = {"q": rows(dtype, k, e), "k": rows(dtype, k, e), "v": rows(dtype, h, f), "g": rows(F32, h, *((e,) if channels else ())), "beta": rows(dtype, h)}
        case("gated_delta_rule", steps, args | {"delta_state": Tensor(F32, (SLOTS, h, e, f)), **step, "eps": eps}, rows(dtype, h, f))
    for steps, dtype, c in ((PREFILL, F32, 75), (DECODE, BF16, 32)):
        case("linear_recurrence", steps, {"x": rows(dtype, c), "decay": rows(F32, c), "lru_state": Tensor(F32, (SLOTS, c)), **step}, rows(dtype, c))
        args = {"k": rows(dtype, c), "v": rows(dtype, c), "log_decay": weight(dtype, c), "bonus": weight(dtype, c)}
        case("wkv", steps, args | {"wkv_state": Tensor(F32, (SLOTS, 3, c)), **step}, rows(dtype, c))


for define in (_linears, _quantized, _experts, _quantized_experts, _routes, _norms, _gated_norms, _glus, _tables, _rotations, _writes, _attention, _latents,
               _pools, _recurrences):  # fmt: skip
    define()
# Without bfloat16 instructions, AVX-512 differs from AVX-512 with them in bfloat16 alone.
EXAMPLES = [(isa, *example) for isa in TARGETS for examples in CASES.values() for example in examples if isa != "avx512vl" or "bfloat16" in repr(example)]


def for_nightly(isa: str, call: Call) -> bool:
    """Whether a richer instruction set has no instructions of its own for a call, but wider vectors; or it has them, and a still richer one is here."""
    least, *_, richest = [*TARGETS] * 2
    if isa == least:
        return False
    return isa != richest or ("bfloat16" not in repr(call) and not call.op.startswith("quantized"))


def candidate_of(isa: str, steps: Steps, call: Call) -> Candidate:
    return next(c for claim in CLAIMS[call.op, "tvm"] for c in claim(call, steps, TARGETS[isa]))


Kernels = Callable[..., dict[str, SharedObject]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Of an instruction set every example's kernel by source text, those for nightly apart; compiled together: a compiler process takes seconds to start."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    @functools.cache
    def of(isa: str, nightly: bool = False) -> dict[str, SharedObject]:
        chosen = [(s, c) for i, s, c in EXAMPLES if i == isa and for_nightly(isa, c) == nightly]
        sources = list(dict.fromkeys(launch.source for s, c in chosen for launch in candidate_of(isa, s, c).launches))
        with open(folder / "tvm_kernels.lock", "w") as lock:  # parallel test processes share what the first compiles
            fcntl.flock(lock, fcntl.LOCK_EX)
            paths = compile_sources(sources, TARGETS[isa], folder / "tvm_kernels", jobs=2)
        return {s.text: load(Kernel(p.stem, s.family, "tvm", s.symbol, p.name, ""), p) for s, p in zip(sources, paths, strict=True)}

    return of


def runs(steps: Steps, call: Call) -> Iterator[dict[str, Any]]:
    """Argument values of steps of several sizes."""
    if {"slot_mapping", "cu_seqlens_q"} & set(call.args):
        page_size = next((call.args[n].shape[2] for n in ("k_cache", "latent_cache", "index_cache") if n in call.args), 1)
        for new in NEW_TOKENS[steps.max_tokens]:
            batch, sizes = _batch(new, page_size)
            yield {n: batch[n] if n in batch and a is not None else _random(n, a, call, sizes) for n, a in call.args.items()}
    else:
        for t in (t for t in (1, 2, 3, 7, 16, 37) if t <= steps.max_tokens):
            sizes = {"T": t, "R": min(t, steps.max_rows)}
            yield {n: _random(n, a, call, sizes) for n, a in call.args.items()}


def _batch(new: list[int], page_size: int) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Step inputs on shuffled pages, 0 to 70 tokens cached, of one or two sequences none."""
    lens = [n if n and s in (1, 2) else n + int(torch.randint(0, 70, ())) for s, n in enumerate(new)]
    extra = 0
    if len(new) > 1:
        lens[-1], extra = 0, 3
    starts = torch.tensor([0, *new]).cumsum(0)
    width = -(-max(lens) // page_size) + 1
    pages = torch.randperm(len(new) * width + 2)[: len(new) * width].view(len(new), width)
    slots = torch.full((sum(new) + extra,), -1)
    for s, (n, length) in enumerate(zip(new, lens, strict=True)):
        if length:
            positions = torch.arange(length - n, length)
            slots[starts[s] : starts[s + 1]] = pages[s, positions // page_size] * page_size + positions % page_size
    state_slots = torch.where(torch.tensor(lens) > 0, torch.randperm(len(new) + 2)[: len(new)], -1)
    batch = {"cu_seqlens_q": starts, "seq_lens": torch.tensor(lens), "page_table": pages, "slot_mapping": slots, "pooling": torch.arange(len(new)) % 3}
    batch["state_slots"] = state_slots
    ends = torch.full((len(slots),), 0)
    ends[: starts[-1]] = torch.tensor([max(0, length - n + i + 1) for n, length in zip(new, lens, strict=True) for i in range(n)])
    drawn = torch.rand(len(slots), max(40, *lens)).argsort(-1)[:, :40]
    batch["indices"] = torch.where(drawn < ends[:, None], drawn, -1)  # positions of the past, in any order
    sizes = {"T": len(slots), "S": len(new), "P_full": width, "N_full": len(new) * width + 2, "N_slot": len(new) + 2}
    return {n: v.int() for n, v in batch.items()}, sizes


def _random(name: str, arg: Any, call: Call, sizes: dict[str, int]) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    shape = [evaluate(d, sizes) for d in arg.shape]
    part = {p: p for p in ("weight", "scale", "zero")} | {f"{p[0]}_{side}": p for p in ("weight", "scale", "zero") for side in ("in", "out")}
    if call.op in ("quantized_linear", "quantized_moe") and name in part:
        mean, std = formats.get(call.args["format"]).moments(part[name], call.args["inner"] if name.endswith("_out") else call.args["x"].shape[1])
        return torch.randint(0, 256, shape, dtype=arg.dtype) if part[name] == "weight" else (torch.randn(shape) * std + mean).to(arg.dtype)
    if arg.dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=arg.dtype)
    if name.endswith(("_scale", "_static")):
        return (torch.rand(shape) + 0.5) / 64
    if name in RANGES:
        low, high = RANGES[name]
        return (torch.rand(shape) * (high - low) + low).to(arg.dtype)
    if not arg.dtype.is_floating_point:
        if name == "expert_ids":
            return torch.randint(-1, call.args.get("w_in", call.args.get("weight")).shape[0] + 1, shape, dtype=arg.dtype)
        below = {"positions": 9000, "rows": sizes["T"], "ids": 99}[name]
        return torch.randint(0, below, shape, dtype=arg.dtype)
    return torch.randn(shape).to(arg.dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if not actual.dtype.is_floating_point and actual.dtype not in QUANTIZED:
        assert torch.equal(actual, expected)
        return
    if actual.dtype in QUANTIZED:  # a value may lie on either side of a rounding; steps of e4m3 are an eighth
        difference = (actual.float() - expected.float()).abs()
        assert (difference <= (1 if actual.dtype == torch.int8 else 0.126 * expected.float().abs())).all()
        assert (difference > 0).float().mean() < 0.01
        return
    difference = (actual.float() - expected).abs() / (expected.abs() + expected.square().mean().sqrt() + 1e-9)
    assert difference.max() <= TOLERANCE[actual.dtype]  # NaN compares false


def garbage(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 99


@pytest.mark.parametrize(("isa", "steps", "call"), [
    pytest.param(i, s, c, id=f"{i}-{c.op}-{n}", marks=[pytest.mark.nightly] if for_nightly(i, c) else []) for n, (i, s, c) in enumerate(EXAMPLES)
])  # fmt: skip
def test_kernel_equals_its_reference(isa: str, steps: Steps, call: Call, kernels: Kernels,
                                     let_go: Callable[[Call, dict[str, Any]], dict[str, Any]]) -> None:  # fmt: skip
    torch.manual_seed(len(repr(call)))
    op, candidate = OPS[call.op], candidate_of(isa, steps, call)
    for values in (let_go(call, v) for v in runs(steps, call)):
        states = [n for n in op.states if values[n] is not None]
        exact = {n: v.float() if isinstance(v, torch.Tensor) and v.dtype in TOLERANCE else v for n, v in values.items()}
        exact |= {n: exact[n].clone() for n in states}
        expected = op.reference(*exact.values())
        expected = expected if isinstance(expected, tuple) else () if expected is None else (expected,)
        outputs = [torch.full(e.shape, garbage(r.dtype), dtype=r.dtype) for e, r in zip(expected, call.results, strict=True)]
        tokens = {"T": next((len(v) for n, v in values.items() if isinstance(call.args[n], Tensor) and call.args[n].shape[0] == T), 0)}
        scratch = [torch.full([evaluate(d, tokens) for d in s.shape], garbage(s.dtype), dtype=s.dtype) for s in candidate.scratch]

        def operand(o: Operand, values: dict[str, Any] = values, outputs: list[torch.Tensor] = outputs, scratch: list[torch.Tensor] = scratch) -> torch.Tensor:
            tensor = values[o.arg] if o.arg is not None else outputs[o.out] if o.out is not None else scratch[o.scratch or 0]
            if o.rows:  # columns of something wider
                wide = torch.full((len(tensor), 8 + tensor[0].numel()), float("nan"), dtype=tensor.dtype)
                tensor = wide[:, 5 : 5 + tensor[0].numel()].copy_(tensor.flatten(1)).unflatten(1, tensor.shape[1:])
            return tensor if o.view is None else tensor.view(o.view)

        for launch in candidate.launches:
            kernels(isa, for_nightly(isa, call))[launch.source.text].bind([operand(o) for o in launch.operands])()
        for actual, wanted in [*zip(outputs, expected, strict=True), *((values[n], exact[n]) for n in states)]:
            assert_close(actual, wanted)


def test_every_family_has_examples() -> None:
    assert {op for op, backend in CLAIMS if backend == "tvm"} == set(CASES)


def test_what_a_family_cannot_do_it_declines() -> None:
    target = TARGETS["fma"]
    x, w = rows(BF16, 32), weight(BF16, 8, 32)
    assert CLAIMS["linear", "tvm"][0](Call("linear", {"x": x, "weight": w, "bias": None}, (rows(BF16, 8),)), PREFILL, target) == []
    assert CLAIMS["linear", "tvm"][0](Call("linear", {"x": x, "weight": weight(F32, 8, 32), "bias": None}, (rows(BF16, 8),)), ONE, target) == []
    steps, call = CASES["paged_attention"][1]
    mixed = Call(call.op, call.args | {"k_cache": Tensor(F32, call.args["k_cache"].shape)}, call.results)
    assert CLAIMS["paged_attention", "tvm"][0](mixed, steps, target) == []


@pytest.mark.parametrize("op", ["paged_attention", "mla_attention"])
def test_deterministic_steps_share_no_pages(op: str) -> None:
    """Where a share ends depends on the last token of a block, which may be another request's chunk."""
    for _, call in CASES[op]:
        [candidate] = CLAIMS[op, "tvm"][0](call, Steps(64, 8, 64, 64, False, deterministic=True), TARGETS["fma"])
        assert candidate.name.startswith("split1_")


@pytest.mark.parametrize("isa", [t for t in TARGETS if t != "avx512vl"])
def test_large_values_saturate_and_nan_stays_nan(isa: str, tmp_path: Path) -> None:
    steps, call = CASES["glu"][0]  # silu, float32
    [launch] = candidate_of(isa, steps, call).launches
    [path] = compile_sources([launch.source], TARGETS[isa], tmp_path, jobs=1)
    gate_up = torch.ones(1, call.args["gate_up"].shape[1])
    gate_up[0, :4] = torch.tensor([float("nan"), 200.0, -200.0, -88.5])
    out = torch.empty(1, gate_up.shape[1] // 2)
    load(Kernel(path.stem, launch.source.family, "tvm", launch.source.symbol, path.name, ""), path).bind([gate_up, out])()
    assert out[0, 0].isnan()
    torch.testing.assert_close(out[0, 1:], OPS["glu"].reference(gate_up, "silu")[0, 1:], atol=1e-30, rtol=1e-5)
