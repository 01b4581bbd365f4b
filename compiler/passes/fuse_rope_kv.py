"""Head norms, rotary embedding and the KV write over a merged QKV projection become `qkv_rope_kv_write`.

The three live in one kernel because they touch each element of q, k and v once, and k and v go straight to their pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ingot.ops import Graph, InputSpec, StateSpec
from ingot.ops.graph import consumed, new_version
from ingot.ops.target import Target

from ..from_function import from_function
from .match import argument, calls, column_slice, drop_unused, ingot


@dataclass(frozen=True)
class _Head:
    """q or k as it is made: columns of `base`, perhaps normalized, then rotated."""

    base: fx.Node
    begin: int
    end: int
    weight: fx.Node | None
    eps: float
    offset: float
    rope: fx.Node


def fuse_rope_kv(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    ropes: dict[fx.Node, list[_Head]] = {}
    for node in list(graph.fx.nodes):
        if calls(node, ingot.rope.default) and (head := _head(node)) is not None:
            ropes.setdefault(head.base, []).append(head)
        if calls(node, ingot.kv_write.default):
            _fuse(graph, node, ropes)
    return drop_unused(graph)


def _head(rope: fx.Node) -> _Head | None:
    x, weight, eps, offset = rope.args[0], None, 0.0, 0.0
    if calls(x, ingot.rms_norm.default) and len(x.users) == 1:
        weight, eps, offset = (argument(x, n) for n in ("weight", "eps", "offset"))
        if weight is None:
            return None
        x = x.args[0]
    base, begin, end = column_slice(x)
    return _Head(base, begin, end, weight, eps, offset, rope) if end > begin else None


def _fuse(graph: Graph, write: fx.Node, ropes: dict[fx.Node, list[_Head]]) -> None:
    k, v, k_cache, v_cache, slots = write.args[:5]
    base, v_begin, v_end = column_slice(v)
    heads = ropes.get(base, [])
    keys = [h for h in heads if h.rope is k]
    queries = [h for h in heads if h.rope is not k and h.begin == 0]
    if len(keys) != 1 or len(queries) != 1 or len(k.users) != 1:
        return
    key, query = keys[0], queries[0]
    contiguous = query.end == key.begin and key.end == v_begin and v_end == base.meta["val"].shape[-1]
    alike = query.rope.args[1:] == k.args[1:] and (key.weight is None) == (query.weight is None) and (key.eps, key.offset) == (query.eps, query.offset)
    if not (contiguous and alike):
        return
    cos, sin, style = k.args[1:]
    num_heads, num_kv_heads = query.rope.meta["val"].shape[1], k.meta["val"].shape[1]
    order = {n: i for i, n in enumerate(graph.fx.nodes)}
    # q moves down to the write; a reader between the two would see it too early
    if any(order[u] < order[write] for u in query.rope.users):
        return
    old = [new_version(write, i) for i in consumed(write)]
    with graph.fx.inserting_before(write):
        fused = graph.call(ingot.qkv_rope_kv_write.default, base, cos, sin, query.weight, key.weight, k_cache, v_cache, slots,
                           num_heads, num_kv_heads, style, key.eps, key.offset, *write.args[5:])  # fmt: skip
        q, *states = [graph.getitem(fused, i) for i in range(1 + len(old))]
    query.rope.replace_all_uses_with(q)
    for before, after in zip(old, states, strict=True):
        before.replace_all_uses_with(after)
    for node in (*old, write, k, query.rope):
        graph.fx.erase_node(node)


def example() -> Graph:
    """One site with float caches, one with quantized ones."""
    heads, kv_heads, dim = 4, 2, 16

    def site(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slot_mapping: torch.Tensor, norms: list[torch.Tensor],
             caches: list[torch.Tensor], scales: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
        q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
        q, k, v = q.reshape(-1, heads, dim), k.reshape(-1, kv_heads, dim), v.reshape(-1, kv_heads, dim)
        q = ingot.rope(ingot.rms_norm(q, norms[0], 1e-6), cos, sin, "neox")
        k = ingot.rope(ingot.rms_norm(k, norms[1], 1e-6), cos, sin, "neox")
        states = ingot.kv_write(k, v, *caches, slot_mapping, *scales)
        return q, list(states)[: len(caches) + len(scales)]

    def fn(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slot_mapping_full: torch.Tensor, k_cache_0: torch.Tensor, v_cache_0: torch.Tensor,
           k_cache_1: torch.Tensor, v_cache_1: torch.Tensor, k_scale_1: torch.Tensor, v_scale_1: torch.Tensor,
           q_norm: torch.Tensor, k_norm: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
        step = (cos, sin, slot_mapping_full, [q_norm, k_norm])
        q0, states0 = site(qkv, *step, [k_cache_0, v_cache_0], [])
        q1, states1 = site(qkv * 2, *step, [k_cache_1, v_cache_1], [k_scale_1, v_scale_1])
        return [q0, q1], [*states0, *states1]

    f32 = torch.float32
    inputs = {
        "qkv": InputSpec(f32, ("T", (heads + 2 * kv_heads) * dim)),
        "cos": InputSpec(f32, ("T", dim)),
        "sin": InputSpec(f32, ("T", dim)),
        "slot_mapping_full": InputSpec(torch.int32, ("T",)),
    }
    cache = StateSpec("full", "page", f32, (kv_heads, 16, dim))
    quantized, scale = StateSpec("full", "page", torch.int8, (kv_heads, 16, dim)), StateSpec("full", "page", f32, (kv_heads, 16))
    states = {"k_cache_0": cache, "v_cache_0": cache, "k_cache_1": quantized, "v_cache_1": quantized, "k_scale_1": scale, "v_scale_1": scale}
    return from_function(fn, inputs, states, {"q_norm": (f32, (dim,)), "k_norm": (f32, (dim,))})
