"""`qkv_rope_kv_write` and the attention of its queries become `qkv_attention`: on a GPU one launch when a step decodes."""

from __future__ import annotations

import torch
from torch import fx

from ingot.ops import Graph, InputSpec, StateSpec
from ingot.ops.graph import new_version
from ingot.ops.target import Target

from ..from_function import from_function
from .match import argument, calls, drop_unused, ingot


def fuse_attention(graph: Graph, target: Target) -> Graph:
    """For CUDA targets alone: between CPU kernels there is no launch to save."""
    if target.kind != "cuda":
        return graph
    graph = graph.copy()
    for attention in list(graph.fx.nodes):
        if calls(attention, ingot.paged_attention.default) and argument(attention, "alibi_slopes") is None:
            q, k_cache, v_cache = attention.args[:3]
            if q.op == "call_function" and len(q.users) == 1 and calls(q.args[0], ingot.qkv_rope_kv_write.default):
                _fuse(graph, q.args[0], attention, [k_cache, v_cache])
    return drop_unused(graph)


def _fuse(graph: Graph, rope: fx.Node, attention: fx.Node, caches: list[fx.Node]) -> None:
    written = [new_version(rope, i) for i in (5, 6)]
    # a later writer of the same caches would come between
    if written != caches or any(user is not attention and user.op != "output" for cache in caches for user in cache.users):
        return
    names = ("cu_seqlens_q", "seq_lens", "page_table", "sinks")
    rest = [argument(rope, n) for n in ("num_heads", "num_kv_heads", "style", "eps", "offset")]
    features = [argument(attention, n) for n in ("scale", "window", "chunk", "softcap")]
    with graph.fx.inserting_before(attention):
        fused = graph.call(ingot.qkv_attention.default, *rope.args[:8], *(argument(attention, n) for n in names), *rest, *features)
        out, *states = [graph.getitem(fused, i) for i in range(3)]
    attention.replace_all_uses_with(out)
    for before, after in zip(caches, states, strict=True):
        before.replace_all_uses_with(after, delete_user_cb=lambda user: user is not attention)
    graph.fx.erase_node(attention)
    q = next(u for u in rope.users if u not in caches)
    for node in (*caches, q, rope):
        graph.fx.erase_node(node)


def example() -> Graph:
    heads, kv_heads, dim = 4, 2, 16

    def fn(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slot_mapping_full: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
           page_table_full: torch.Tensor, k_cache_0: torch.Tensor, v_cache_0: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
        q, k, v = ingot.qkv_rope_kv_write(qkv, cos, sin, None, None, k_cache_0, v_cache_0, slot_mapping_full, heads, kv_heads, "neox")
        return [ingot.paged_attention(q, k, v, cu_seqlens_q, seq_lens, page_table_full, None, None, 0.25, 5)], [k, v]

    f32, i32 = torch.float32, torch.int32
    inputs = {
        "qkv": InputSpec(f32, ("T", (heads + 2 * kv_heads) * dim)),
        "cos": InputSpec(f32, ("T", dim)),
        "sin": InputSpec(f32, ("T", dim)),
        "slot_mapping_full": InputSpec(i32, ("T",)),
        "cu_seqlens_q": InputSpec(i32, ("S+1",)),
        "seq_lens": InputSpec(i32, ("S",)),
        "page_table_full": InputSpec(i32, ("S", "P_full")),
    }
    cache = StateSpec("full", "page", f32, (kv_heads, 16, dim))
    return from_function(fn, inputs, {"k_cache_0": cache, "v_cache_0": cache})
