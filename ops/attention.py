"""Attention: over a paged KV cache, and over whole packed sequences.

T tokens of S sequences, packed; H query heads, K kv heads, E head dim of q and k, F of v; a cache holds N pages of
`page_size` tokens as [N, K, page_size, E or F]. Step inputs, all int32: `cu_seqlens_q` [S+1] delimits the new tokens of
each sequence; `seq_lens` [S] counts cached plus new tokens (0: a padding row, whose output is zero); `page_table` [S, P]
lists each sequence's pages; `slot_mapping` [T] is page · page_size + offset of each new token (−1: do not write).
Prefill, chunked prefill, decode and verification are this one path. Encoders have no cache: `packed_attention` reads k and v
of the step itself.

A quantized cache (`ops.quantize.LARGEST` lists the dtypes) has a scale for each head and token beside it: `k_scale` and `v_scale`, float32
[N, K, page_size], with cached value · scale = k or v. The scale is chosen when a token is written, from its own largest element, or is the
one that a calibrated checkpoint brings for the layer (`k_static`, `v_static`, float32 [1] or [K]).
"""

from __future__ import annotations

from itertools import pairwise

import torch

from .dialect import op
from .norm import rms_norm
from .quantize import quantize
from .rotary import rope


@op("kv_write(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping, Tensor? k_scale=None, Tensor? v_scale=None, "
    "Tensor? k_static=None, Tensor? v_static=None) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda k, *rest: None, states=("k_cache", "v_cache", "k_scale", "v_scale"), host_sync=True)  # fmt: skip
def kv_write(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor,
             k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
             k_static: torch.Tensor | None = None, v_static: torch.Tensor | None = None) -> None:  # fmt: skip
    """Store k [T, K, E] and v [T, K, F] at their slots, quantized head by head where the caches have scales."""
    page_size = k_cache.shape[2]
    rows = (slot_mapping >= 0).nonzero().flatten()
    slots = slot_mapping[rows].long()
    for new, cache, scale, static in ((k, k_cache, k_scale, k_static), (v, v_cache, v_scale, v_static)):
        values = new[rows]
        if scale is not None:
            values, scales = quantize(values, cache.dtype, static)
            scale[slots // page_size, :, slots % page_size] = scales
        cache[slots // page_size, :, slots % page_size] = values.to(cache.dtype)


@op("paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor seq_lens, Tensor page_table, Tensor? sinks, "
    "Tensor? alibi_slopes, float scale, int window=0, int chunk=0, float softcap=0.0, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
    fake=lambda q, k_cache, v_cache, *rest: q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3]), host_sync=True)  # fmt: skip
def paged_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
                    page_table: torch.Tensor, sinks: torch.Tensor | None, alibi_slopes: torch.Tensor | None, scale: float,
                    window: int = 0, chunk: int = 0, softcap: float = 0.0, k_scale: torch.Tensor | None = None,
                    v_scale: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """Causal softmax(scale · q kᵀ) v of q [T, H, E] over each sequence's pages → [T, H, F]; softmax in float32.

    `window` w > 0 sees the last w positions only; `chunk` c > 0 only positions of the same block of c; `softcap` s > 0
    replaces a score x by s · tanh(x / s); `sinks` [H] are extra logits that take probability and carry no value;
    `alibi_slopes` [H] add −slope · distance (Press et al. 2022).
    """
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[3])
    starts = cu_seqlens_q.tolist()
    group = q.shape[1] // k_cache.shape[1]
    page_size = k_cache.shape[2]
    for s, length in enumerate(seq_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if length == 0 or begin == end:
            continue
        pages = page_table[s, : -(-length // page_size)].long()
        k, v = (_cached(c, c_scale, pages, length).repeat_interleave(group, 1) for c, c_scale in ((k_cache, k_scale), (v_cache, v_scale)))
        scores = torch.einsum("qhe,khe->hqk", q[begin:end].float(), k) * scale
        if softcap > 0:
            scores = torch.tanh(scores / softcap) * softcap
        q_pos = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        k_pos = torch.arange(length, device=q.device)[None]
        if alibi_slopes is not None:
            scores = scores + alibi_slopes.float()[:, None, None] * (k_pos - q_pos)
        seen = k_pos <= q_pos
        if window > 0:
            seen = seen & (k_pos > q_pos - window)
        if chunk > 0:
            seen = seen & (k_pos // chunk == q_pos // chunk)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)], -1)
        probabilities = scores.softmax(-1)[..., :length]
        out[begin:end] = torch.einsum("hqk,khf->qhf", probabilities, v).to(q.dtype)
    return out


def _cached(cache: torch.Tensor, scale: torch.Tensor | None, pages: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens on `pages`, float32 [length, K, E or F]."""
    values = cache[pages].float()
    if scale is not None:
        values = values * scale[pages].unsqueeze(-1)
    return values.transpose(1, 2).flatten(0, 1)[:length]


@op("packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, float scale, int window=0) -> Tensor",
    fake=lambda q, k, v, *rest: q.new_empty(q.shape[0], q.shape[1], v.shape[2]), host_sync=True)  # fmt: skip
def packed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, scale: float, window: int = 0) -> torch.Tensor:
    """softmax(scale · q kᵀ) v of q [T, H, E], k [T, K, E], v [T, K, F] within each sequence, in both directions → [T, H, F].

    Softmax in float32. `window` w > 0 sees positions less than w away. Tokens after the last sequence get zeros.
    """
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    group = q.shape[1] // k.shape[1]
    starts = cu_seqlens_q.tolist()
    for begin, end in pairwise(starts):
        keys, values = (t[begin:end].float().repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q[begin:end].float(), keys) * scale
        if window > 0:
            positions = torch.arange(end - begin, device=q.device)
            scores = scores.masked_fill((positions[:, None] - positions).abs() >= window, float("-inf"))
        out[begin:end] = torch.einsum("hqk,khf->qhf", scores.softmax(-1), values).to(q.dtype)
    return out


@op("qkv_rope_kv_write(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, Tensor k_cache, Tensor v_cache, Tensor slot_mapping, "
    "int num_heads, int num_kv_heads, str style, float eps=0.0, float offset=0.0, Tensor? k_scale=None, Tensor? v_scale=None, Tensor? k_static=None, "
    "Tensor? v_static=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda qkv, cos, sin, qw, kw, k_cache, v_cache, slots, num_heads, *rest: qkv.new_empty(qkv.shape[0], num_heads, k_cache.shape[3]),
    states=("k_cache", "v_cache", "k_scale", "v_scale"), host_sync=True)  # fmt: skip
def qkv_rope_kv_write(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
                      k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor, num_heads: int, num_kv_heads: int,
                      style: str, eps: float = 0.0, offset: float = 0.0, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
                      k_static: torch.Tensor | None = None, v_static: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """qkv [T, H·E + K·E + K·F] → rotated q [T, H, E]; rotated k and v go to their slots.

    With `q_weight` [E] and `k_weight` [E], q and k are RMS-normalized per head first (Qwen3, Gemma 3). `style` as in `rope`.
    """
    e, f = k_cache.shape[3], v_cache.shape[3]
    q, k, v = qkv.split([num_heads * e, num_kv_heads * e, num_kv_heads * f], -1)
    q, k, v = q.unflatten(-1, (num_heads, e)), k.unflatten(-1, (num_kv_heads, e)), v.unflatten(-1, (num_kv_heads, f))
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps, offset)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps, offset)
    kv_write(rope(k, cos, sin, style), v, k_cache, v_cache, slot_mapping, k_scale, v_scale, k_static, v_static)
    return rope(q, cos, sin, style)


@op("qkv_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, Tensor k_cache, Tensor v_cache, Tensor slot_mapping, "
    "Tensor cu_seqlens_q, Tensor seq_lens, Tensor page_table, Tensor? sinks, int num_heads, int num_kv_heads, str style, float eps, float offset, "
    "float scale, int window=0, int chunk=0, float softcap=0.0, Tensor? k_scale=None, Tensor? v_scale=None, Tensor? k_static=None, "
    "Tensor? v_static=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda qkv, cos, sin, qw, kw, k_cache, v_cache, slots, cu, lens, table, sinks, num_heads, *rest: qkv.new_empty(
        qkv.shape[0], num_heads, v_cache.shape[3]),
    states=("k_cache", "v_cache", "k_scale", "v_scale"), host_sync=True)  # fmt: skip
def qkv_attention(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
                  k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
                  page_table: torch.Tensor, sinks: torch.Tensor | None, num_heads: int, num_kv_heads: int, style: str, eps: float, offset: float,
                  scale: float, window: int = 0, chunk: int = 0, softcap: float = 0.0, k_scale: torch.Tensor | None = None,
                  v_scale: torch.Tensor | None = None, k_static: torch.Tensor | None = None, v_static: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """`qkv_rope_kv_write`, then `paged_attention` of its queries → [T, H, F]."""
    q = qkv_rope_kv_write(qkv, cos, sin, q_weight, k_weight, k_cache, v_cache, slot_mapping, num_heads, num_kv_heads, style, eps, offset,
                          k_scale, v_scale, k_static, v_static)  # fmt: skip
    return paged_attention(q, k_cache, v_cache, cu_seqlens_q, seq_lens, page_table, sinks, None, scale, window, chunk, softcap, k_scale, v_scale)
