"""Writes to the paged KV cache: alone, and behind the split, normalization and rotation of a merged QKV projection."""

from __future__ import annotations

import torch

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .rotary import Rotation
from .vector import DTYPES, Vectors, parallel


@claims("kv_write", "tvm")
def kv_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    k, v, k_cache, v_cache = (call.args[n] for n in ("k", "v", "k_cache", "v_cache"))
    if any(t.dtype not in DTYPES for t in (k, v, k_cache, v_cache)) or call.args["slot_mapping"].dtype != torch.int32:
        return []
    vectors, heads = Vectors(target), k.shape[1]

    def copy(name: str, tensor: Tensor, cache: Tensor) -> str:
        def line(i: str, count: str | None) -> list[str]:
            value = vectors.load(DTYPES[tensor.dtype], f"new_{name}[t, head, {i}]", count)
            return [vectors.store(DTYPES[cache.dtype], f"{name}_cache[page, head, offset, {i}]", value, count)]

        return vectors.over(tensor.shape[-1], line, 3)  # type: ignore[arg-type]

    body = f"""
for t in {parallel(steps, k)}(tokens):
    if slot_mapping[t] >= 0:
{_slot(k_cache.shape[2])}
        for head in T.serial({heads}):
{copy("k", k, k_cache)}
{copy("v", v, v_cache)}
"""
    inputs = [(f"new_{n}", DTYPES[call.args[n].dtype], ("tokens", *call.args[n].shape[1:])) for n in ("k", "v")]
    text = vectors.script("kv_write", [*inputs, *_caches(call), ("slot_mapping", "int32", ("tokens",))], body)
    operands = tuple(Operand(arg=n) for n in ("k", "v", "k_cache", "v_cache", "slot_mapping"))
    return [Candidate("tokens", (Launch(Source("kv_write", "tvm", "kv_write", text), operands),))]


@claims("qkv_rope_kv_write", "tvm")
def qkv_rope_kv_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    weights = [n for n in ("q_weight", "k_weight") if call.args[n] is not None]
    floats = [call.args[n] for n in ("qkv", "cos", "sin", *weights, "k_cache", "v_cache")]
    if any(t.dtype not in DTYPES for t in floats) or call.args["cos"].dtype != call.args["sin"].dtype or call.args["slot_mapping"].dtype != torch.int32:
        return []
    names = ("qkv", "cos", "sin", *weights, "k_cache", "v_cache", "slot_mapping")
    source = Source("qkv_rope_kv_write", "tvm", "qkv_rope_kv_write", _script(Vectors(target), call, steps, weights))
    return [Candidate("tokens", (Launch(source, (*(Operand(arg=n) for n in names), Operand(out=0))),))]


def _script(v: Vectors, call: Call, steps: Steps, weights: list[str]) -> str:
    qkv, k_cache, v_cache = call.args["qkv"], call.args["k_cache"], call.args["v_cache"]
    heads, kv_heads = call.args["num_heads"], call.args["num_kv_heads"]
    (_, _, page_size, e), f, dtype = k_cache.shape, v_cache.shape[3], DTYPES[qkv.dtype]
    rotate = Rotation.of(v, call.args["style"], call.args["cos"])

    def rotated(begin: int, weight: str, target: str, target_dtype: str, depth: int) -> str:
        """Lines that normalize, when there is a weight, and rotate head `head` of those from column `begin` on."""

        def element(k: str, count: str | None) -> str:
            return v.load(dtype, f"qkv[t, {begin} + head * {e} + {k}]", count)

        def square(k: str, count: str | None) -> list[str]:
            return [f"element: T.let = {element(k, count)}", "squares[0] = squares[0] + element * element"]

        def normalized(k: str, count: str | None) -> str:
            offset = f" + {v.splat(call.args['offset'])}" if call.args["offset"] else ""
            return f"{element(k, count)} * {v.splat('scale[0]')} * ({v.load(DTYPES[call.args[weight].dtype], f'{weight}[{k}]', count)}{offset})"

        lines = rotate(normalized if weight in weights else element, lambda k, value, n: v.store(target_dtype, f"{target}, {k}]", value, n), e, depth)
        if weight not in weights:
            return lines
        tab = "    " * depth
        return f"""
{tab}squares = T.alloc_buffer((1,), "{v.type}", scope="global")
{tab}scale = T.alloc_buffer((1,), "float32", scope="global")
{tab}squares[0] = {v.splat(0.0)}
{v.over(e, square, depth)}
{tab}scale[0] = T.float32(1) / T.sqrt({v.sum("squares[0]")} / T.float32({e}) + T.float32({call.args["eps"]!r}))
{lines}"""

    def value(k: str, count: str | None) -> list[str]:
        loaded = v.load(dtype, f"qkv[t, {(heads + kv_heads) * e} + head * {f} + {k}]", count)
        return [v.store(DTYPES[v_cache.dtype], f"v_cache[page, head, offset, {k}]", loaded, count)]

    body = f"""
for t in {parallel(steps, qkv)}(tokens):
    for head in T.serial({heads}):
{rotated(0, "q_weight", "q[t, head", dtype, 2)}
    if slot_mapping[t] >= 0:
{_slot(page_size)}
        for head in T.serial({kv_heads}):
{rotated(heads * e, "k_weight", "k_cache[page, head, offset", DTYPES[k_cache.dtype], 3)}
{v.over(f, value, 3)}
"""
    tables = [(n, DTYPES[call.args[n].dtype], ("tokens", call.args[n].shape[-1])) for n in ("cos", "sin")]
    norms = [(n, DTYPES[call.args[n].dtype], (e,)) for n in weights]
    buffers = [
        ("qkv", dtype, ("tokens", qkv.shape[1])),
        *tables,
        *norms,
        *_caches(call),
        ("slot_mapping", "int32", ("tokens",)),
        ("q", dtype, ("tokens", heads, e)),
    ]
    return v.script("qkv_rope_kv_write", buffers, body)


def _slot(page_size: int) -> str:
    # A cache may have more than 2³¹ elements.
    return f"""
        page: T.let = T.cast(slot_mapping[t] // {page_size}, "int64")
        offset: T.let = slot_mapping[t] % {page_size}"""


def _caches(call: Call) -> list[tuple[str, str, tuple[int | str, ...]]]:
    return [(n, DTYPES[call.args[n].dtype], ("pages", *call.args[n].shape[1:])) for n in ("k_cache", "v_cache")]
