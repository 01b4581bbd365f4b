"""The norm of a latent, the rotations of its key and of the queries, and the write become `latent_rope_write`, which reads the projections as they lie.

What is left of the queries, their unrotated part, goes on to `head_linear` as rows of its own.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ingot.ops import Graph, InputSpec, StateSpec
from ingot.ops.target import Target

from ..from_function import from_function
from .match import argument, aten, calls, column_slice, drop_unused, ingot, last_dim, through_reshapes


def fuse_latent_write(graph: Graph, target: Target) -> Graph:
    graph = graph.copy()
    for node in list(graph.fx.nodes):
        if calls(node, ingot.mla_attention.default) and calls(write := node.args[2], ingot.latent_write.default):
            _fuse(graph, node, write)
    return drop_unused(graph)


def _fuse(graph: Graph, attention: fx.Node, write: fx.Node) -> None:
    latent, key, cache, slots = write.args
    q_latent, turned, turned_key = attention.args[0], attention.args[1], through_reshapes(key)
    made = calls(latent, ingot.rms_norm.default) and calls(q_latent, ingot.head_linear.default)
    if not made or not (calls(turned, ingot.rope.default) and calls(turned_key, ingot.rope.default)):
        return
    weight, size, r = argument(latent, "weight"), latent.meta["val"].shape[1], key.meta["val"].shape[1]
    straight, (cos, sin, style) = q_latent.args[0], turned.args[1:]
    rotated = cos.meta["val"].shape[1] * (2 if style.endswith("_half") else 1)
    kv, kv_begin, kv_end = column_slice(latent.args[0])
    key_kv, key_begin, key_end = column_slice(turned_key.args[0])
    together = kv is key_kv and (kv_end, key_end) == (key_begin, kv_begin + size + r) and kv_end - kv_begin == size
    if weight is None or turned_key.args[1:] != turned.args[1:] or rotated != r or not together:
        return
    parts = [_heads(straight), _heads(turned.args[0])]
    order = {n: i for i, n in enumerate(graph.fx.nodes)}
    # queries move down to the write; a reader before it would see them too early
    if None in parts or parts[0][0] is not parts[1][0] or any(order[u] < order[write] for n in (straight, turned) for u in n.users):  # type: ignore[index]
        return
    num_heads, nope = straight.meta["val"].shape[1:]
    (q, *first), (_, *last) = parts  # type: ignore[misc]
    with graph.fx.inserting_before(write):
        fused = graph.call(ingot.latent_rope_write.default, q, kv, cos, sin, weight, cache, slots, first, last, kv_begin, num_heads, nope, style,
                           argument(latent, "eps"), argument(latent, "offset"))  # fmt: skip
        results = [graph.getitem(fused, i) for i in range(3)]
    for before, after in zip((straight, turned, write), results, strict=True):
        before.replace_all_uses_with(after)
    for node in (write, turned):
        graph.fx.erase_node(node)


def _heads(part: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Where `part` [T, H, E] of heads lies: a base [T, N], the column of the first head's and how far the next head's is; None if it is no such part."""
    width = part.meta["val"].shape[2]
    base, begin, end = column_slice(part)
    if end > begin:
        return base, begin, width
    if not calls(part, operator.getitem) or not calls(split := part.args[0], aten.split_with_sizes.default, aten.split.sizes) or not last_dim(split):
        return None
    base, begin, end = column_slice(split.args[0])
    return (base, begin + sum(split.args[1][: part.args[1]]), split.args[0].meta["val"].shape[2]) if end > begin else None


def example() -> Graph:
    """One site whose queries are a projection of their own, head by head, one where they lie beside the latent, part by part."""
    heads, nope, r, size = 3, 8, 8, 16

    def site(first: torch.Tensor, last: torch.Tensor, kv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: list[torch.Tensor],
             cache: torch.Tensor, norm: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        latent, key = kv.split([size, r], -1)
        turned, key = ingot.rope(last, cos, sin, "dsv3"), ingot.rope(key.reshape(-1, 1, r), cos, sin, "dsv3").reshape(-1, r)
        cache = ingot.latent_write(ingot.rms_norm(latent, norm, 1e-6), key, cache, batch[0])
        return ingot.mla_attention(ingot.head_linear(first, up), turned, cache, *batch[1:], None, None, 0.3), cache

    def fn(q: torch.Tensor, both: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slot_mapping_full: torch.Tensor, cu_seqlens_q: torch.Tensor,
           seq_lens: torch.Tensor, page_table_full: torch.Tensor, latent_cache_0: torch.Tensor, latent_cache_1: torch.Tensor, norm: torch.Tensor,
           up: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
        batch = [slot_mapping_full, cu_seqlens_q, seq_lens, page_table_full]
        first, last, kv = both.split([heads * nope, heads * r, size + r], -1)
        by_head = q.reshape(-1, heads, nope + r).split([nope, r], -1)
        y0, cache_0 = site(by_head[0], by_head[1], kv, cos, sin, batch, latent_cache_0, norm, up)
        y1, cache_1 = site(first.reshape(-1, heads, nope), last.reshape(-1, heads, r), kv * 2, cos, sin, batch, latent_cache_1, norm, up)
        return [y0, y1], [cache_0, cache_1]

    f32, i32 = torch.float32, torch.int32
    inputs = {
        "q": InputSpec(f32, ("T", heads * (nope + r))),
        "both": InputSpec(f32, ("T", heads * (nope + r) + size + r)),
        "cos": InputSpec(f32, ("T", r)),
        "sin": InputSpec(f32, ("T", r)),
        "slot_mapping_full": InputSpec(i32, ("T",)),
        "cu_seqlens_q": InputSpec(i32, ("S+1",)),
        "seq_lens": InputSpec(i32, ("S",)),
        "page_table_full": InputSpec(i32, ("S", "P_full")),
    }
    states = dict.fromkeys(("latent_cache_0", "latent_cache_1"), StateSpec("full", "page", f32, (1, 16, size + r)))
    return from_function(fn, inputs, states, {"norm": (f32, (size,)), "up": (f32, (heads, size, nope))})
