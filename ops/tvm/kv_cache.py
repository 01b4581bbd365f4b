"""Writes to the paged KV cache: alone, and behind the split, normalization and rotation of a merged QKV projection.

A quantized cache takes a head in two passes over its elements: one for the largest, unless the scale is given, and one that writes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, claims
from ..quantize import LARGEST
from ..target import Target
from .rotary import Rotation
from .vector import CACHE_DTYPES, DTYPES, Buffer, Vectors, cache_operand, parallel

_CACHES = ("k_cache", "v_cache")
_SCALES = ("k_scale", "v_scale", "k_static", "v_static")


@claims("kv_write", "tvm")
def kv_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    k, v = call.args["k"], call.args["v"]
    if k.dtype not in DTYPES or v.dtype not in DTYPES or not _writable(call):
        return []
    vectors = Vectors(target)

    def copy(name: str) -> str:
        tensor = call.args[name]

        def value(i: str, count: str | None) -> str:
            return vectors.load(DTYPES[tensor.dtype], f"new_{name}[t, head, {i}]", count)

        return _stored(vectors, call, name, value, tensor.shape[-1])  # type: ignore[arg-type]

    body = f"""
for t in {parallel(steps, k)}(tokens):
    if slot_mapping[t] >= 0:
{_slot(call.args["k_cache"].shape[2])}
        for head in T.serial({k.shape[1]}):
{copy("k")}
{copy("v")}
"""
    inputs: list[Buffer] = [(f"new_{n}", DTYPES[call.args[n].dtype], ("tokens", *call.args[n].shape[1:])) for n in ("k", "v")]
    text = vectors.script("kv_write", [*inputs, *_caches(call), ("slot_mapping", "int32", ("tokens",))], body)
    operands = (Operand(arg="k"), Operand(arg="v"), *_cache_operands(call), Operand(arg="slot_mapping"))
    return [Candidate("tokens", (Launch(Source("kv_write", "tvm", "kv_write", text), operands),))]


@claims("qkv_rope_kv_write", "tvm")
def qkv_rope_kv_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    weights = [n for n in ("q_weight", "k_weight") if call.args[n] is not None]
    floats = [call.args[n] for n in ("qkv", "cos", "sin", *weights)]
    if any(t.dtype not in DTYPES for t in floats) or call.args["cos"].dtype != call.args["sin"].dtype or not _writable(call):
        return []
    source = Source("qkv_rope_kv_write", "tvm", "qkv_rope_kv_write", _script(Vectors(target), call, steps, weights))
    before, after = ("qkv", "cos", "sin", *weights), (Operand(arg="slot_mapping"), Operand(out=0))
    return [Candidate("tokens", (Launch(source, (*(Operand(arg=n) for n in before), *_cache_operands(call), *after)),))]


def _writable(call: Call) -> bool:
    return all(call.args[n].dtype in CACHE_DTYPES for n in _CACHES) and call.args["slot_mapping"].dtype == torch.int32


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

        lines = rotate(normalized if weight in weights else element, lambda k, value, n: v.store(target_dtype, f"{target}{k}]", value, n), e, depth)
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

    def value(k: str, count: str | None) -> str:
        return v.load(dtype, f"qkv[t, {(heads + kv_heads) * e} + head * {f} + {k}]", count)

    if call.args["k_scale"] is None:
        key = rotated(heads * e, "k_weight", "k_cache[page, head, offset, ", CACHE_DTYPES[k_cache.dtype], 3)
    else:
        key = f"""            turned = T.alloc_buffer(({e},), "float32", scope="global")
{rotated(heads * e, "k_weight", "turned[", "float32", 3)}
{_stored(v, call, "k", lambda k, count: v.load("float32", f"turned[{k}]", count), e)}"""
    body = f"""
for t in {parallel(steps, qkv)}(tokens):
    for head in T.serial({heads}):
{rotated(0, "q_weight", "q[t, head, ", dtype, 2)}
    if slot_mapping[t] >= 0:
{_slot(page_size)}
        for head in T.serial({kv_heads}):
{key}
{_stored(v, call, "v", value, f)}
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


def _stored(v: Vectors, call: Call, name: str, value: Callable[[str, str | None], str], size: int) -> str:
    """Lines that write `size` elements, value(first, count), of head `head` of k or v to the slot, and their scale if there is one."""
    dtype, depth = call.args[f"{name}_cache"].dtype, 3
    tab = "    " * depth
    if call.args[f"{name}_scale"] is None:
        return v.over(size, lambda k, n: [v.store(CACHE_DTYPES[dtype], f"{name}_cache[page, head, offset, {k}]", value(k, n), n)], depth)
    static = call.args[f"{name}_static"]
    scale, inverse = f"{name}_scale[page, head, offset]", f"inverse_{name}"

    def widest(k: str, count: str | None) -> list[str]:
        here = f"{name}_here"
        return [f"{here}: T.let = {value(k, count)}", f"most_{name}[0] = T.max(most_{name}[0], T.max({here}, {v.splat(0.0)} - {here}))"]

    def scaled(k: str, count: str | None) -> list[str]:
        return [v.store(CACHE_DTYPES[dtype], f"{name}_cache[page, head, offset, {k}]", f"({value(k, count)}) * {v.splat(inverse)}", count)]

    if static is None:
        lines = f'''{tab}most_{name} = T.alloc_buffer((1,), "{v.type}", scope="global")
{tab}most_{name}[0] = {v.splat(0.0)}
{v.over(size, widest, depth)}
{tab}{scale} = {v.max(f"most_{name}[0]")} / T.float32({LARGEST[dtype]!r})'''
    else:
        lines = f"{tab}{scale} = {name}_static[{'0' if static.shape == (1,) else 'head'}]"
    return f"""{lines}
{tab}{inverse}: T.let = T.if_then_else({scale} > T.float32(0), T.float32(1) / {scale}, T.float32(0))
{v.over(size, scaled, depth)}"""


def _slot(page_size: int) -> str:
    # A cache may have more than 2³¹ elements.
    return f"""
        page: T.let = T.cast(slot_mapping[t] // {page_size}, "int64")
        offset: T.let = slot_mapping[t] % {page_size}"""


def _caches(call: Call) -> list[Buffer]:
    present = [n for n in _SCALES if call.args[n] is not None]
    shapes = {n: call.args[n].shape if n.endswith("static") else ("pages", *call.args[n].shape[1:]) for n in present}
    return [
        *((n, CACHE_DTYPES[call.args[n].dtype], ("pages", *call.args[n].shape[1:])) for n in _CACHES),
        *((n, "float32", shape) for n, shape in shapes.items()),
    ]


def _cache_operands(call: Call) -> list[Operand]:
    return [*(cache_operand(call, n) for n in _CACHES), *(Operand(arg=n) for n in _SCALES if call.args[n] is not None)]
