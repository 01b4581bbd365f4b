"""`qkv_rope_kv_write` and the attention of its queries become `qkv_attention`: on a GPU one launch when a step decodes."""

from __future__ import annotations

import torch
from torch import fx

from ingot.ops import Graph, InputSpec, StateSpec
from ingot.ops.graph import consumed, new_version
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
            q = attention.args[0]
            if q.op == "call_function" and len(q.users) == 1 and calls(q.args[0], ingot.qkv_rope_kv_write.default):
                _fuse(graph, q.args[0], attention)
    return drop_unused(graph)


def _fuse(graph: Graph, rope: fx.Node, attention: fx.Node) -> None:
    caches = [new_version(rope, i) for i in consumed(rope)]
    read = [argument(attention, n) for n in ("k_cache", "v_cache", "k_scale", "v_scale")]
    # a later writer of the same caches would come between
    if caches != [r for r in read if r is not None] or any(user is not attention and user.op != "output" for cache in caches for user in cache.users):
        return
    names = ("cu_seqlens_q", "seq_lens", "page_table", "sinks")
    rest = [argument(rope, n) for n in ("num_heads", "num_kv_heads", "style", "eps", "offset")]
    features = [argument(attention, n) for n in ("scale", "window", "chunk", "softcap")]
    scales = [argument(rope, n) for n in ("k_scale", "v_scale", "k_static", "v_static")]
    with graph.fx.inserting_before(attention):
        fused = graph.call(ingot.qkv_attention.default, *rope.args[:8], *(argument(attention, n) for n in names), *rest, *features, *scales)
        out, *states = [graph.getitem(fused, i) for i in range(1 + len(caches))]
    attention.replace_all_uses_with(out)
    for before, after in zip(caches, states, strict=True):
        before.replace_all_uses_with(after, delete_user_cb=lambda user: user is not attention)
    graph.fx.erase_node(attention)
    q = next(u for u in rope.users if u not in caches)
    for node in (*caches, q, rope):
        graph.fx.erase_node(node)


def example() -> Graph:
    """One site with float caches, one with quantized ones."""
    heads, kv_heads, dim = 4, 2, 16

    def fn(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slot_mapping_full: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
           page_table_full: torch.Tensor, k_cache_0: torch.Tensor, v_cache_0: torch.Tensor, k_cache_1: torch.Tensor, v_cache_1: torch.Tensor,
           k_scale_1: torch.Tensor, v_scale_1: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
        outs, states = [], []
        for caches, scales in (([k_cache_0, v_cache_0], []), ([k_cache_1, v_cache_1], [k_scale_1, v_scale_1])):
            q, *new = ingot.qkv_rope_kv_write(qkv, cos, sin, None, None, *caches, slot_mapping_full, heads, kv_heads, "neox", 0.0, 0.0, *scales)
            k, v, *scales = new = new[: 2 + len(scales)]
            outs.append(ingot.paged_attention(q, k, v, cu_seqlens_q, seq_lens, page_table_full, None, None, 0.25, 5, 0, 0.0, *scales))
            states += new
        return outs, states

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
    cache, quantized = (StateSpec("full", "page", dtype, (kv_heads, 16, dim)) for dtype in (f32, torch.int8))
    scale = StateSpec("full", "page", f32, (kv_heads, 16))
    states = {"k_cache_0": cache, "v_cache_0": cache, "k_cache_1": quantized, "v_cache_1": quantized, "k_scale_1": scale, "v_scale_1": scale}
    return from_function(fn, inputs, states)
