"""Multi-head latent attention (DeepSeek-AI 2024) over a paged cache of latents, with the up-projections absorbed.

A token leaves in the cache its compressed latent [L] and one rotated key [R] that all heads share, side by side, as one head:
[N, 1, page_size, L + R] in the group `latent`. Keys and values of a head are never made: its query goes into the latent space
(`head_linear` with the key half of the up-projection), attention is over latents, and its result comes out of there
(`head_linear` with the value half). Sparse attention chooses the tokens that it sees by a smaller cache of keys in the same
group. Step inputs as in `attention`; T tokens, H heads.
"""

from __future__ import annotations

import torch

from .dialect import op
from .norm import rms_norm
from .rotary import rope


@op("head_linear(Tensor x, Tensor weight) -> Tensor", rowwise=True, fake=lambda x, weight: x.new_empty(x.shape[0], x.shape[1], weight.shape[1]))
def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A linear layer of its own for each head: x [T, H, K] with weight [H, O, K] → [T, H, O]."""
    return torch.einsum("thk,hok->tho", x, weight).contiguous()


@op("latent_write(Tensor latent, Tensor? rope, Tensor latent_cache, Tensor slot_mapping) -> Tensor",
    fake=lambda latent, rope, latent_cache, slot_mapping: None, states=("latent_cache",), host_sync=True)  # fmt: skip
def latent_write(latent: torch.Tensor, rope: torch.Tensor | None, latent_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Store latent [T, L], and rope [T, R] behind it if there is one, at their slots (−1: do not write); latent_cache [N, 1, page_size, L + R]."""
    page_size = latent_cache.shape[2]
    rows = (slot_mapping >= 0).nonzero().flatten()
    slots = slot_mapping[rows].long()
    whole = latent if rope is None else torch.cat([latent, rope], -1)
    latent_cache[slots // page_size, 0, slots % page_size] = whole[rows].to(latent_cache.dtype)


@op("latent_rope_write(Tensor q, Tensor kv, Tensor cos, Tensor sin, Tensor weight, Tensor latent_cache, Tensor slot_mapping, int[] straight, "
    "int[] turned, int kv_begin, int num_heads, int nope, str style, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    fake=lambda q, kv, cos, sin, weight, latent_cache, slots, straight, turned, kv_begin, num_heads, nope, *rest: (
        q.new_empty(q.shape[0], num_heads, nope), q.new_empty(q.shape[0], num_heads, latent_cache.shape[3] - weight.shape[0])),
    states=("latent_cache",), host_sync=True)  # fmt: skip
def latent_rope_write(q: torch.Tensor, kv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor, latent_cache: torch.Tensor,
                      slot_mapping: torch.Tensor, straight: list[int], turned: list[int], kv_begin: int, num_heads: int, nope: int, style: str,
                      eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Two parts of the queries' heads, columns of q: N (`nope`) as they are → [T, H, N], and R rotated → [T, H, R].

    `straight` and `turned` say where the part of the first head begins and how far the next head's is.
    At column `kv_begin` of kv stand a latent [L], RMS-normalized with `weight` [L], and a key [R], rotated: they go to their slots. `style` as in `rope`.
    """
    size = weight.shape[0]
    r = latent_cache.shape[3] - size
    first, last = (q[:, b + s * torch.arange(num_heads, device=q.device)[:, None] + torch.arange(n, device=q.device)]
                   for (b, s), n in ((straight, nope), (turned, r)))  # fmt: skip
    latent, key = kv[:, kv_begin : kv_begin + size + r].split([size, r], 1)
    latent_write(rms_norm(latent, weight, eps, offset), rope(key[:, None], cos, sin, style)[:, 0], latent_cache, slot_mapping)
    return first, rope(last, cos, sin, style)


@op("mla_attention(Tensor q_latent, Tensor q_rope, Tensor latent_cache, Tensor cu_seqlens_q, Tensor seq_lens, Tensor page_table, "
    "Tensor? indices, Tensor? sinks, float scale, int window=0) -> Tensor",
    fake=lambda q_latent, *rest: torch.empty_like(q_latent, memory_format=torch.contiguous_format), host_sync=True)  # fmt: skip
def mla_attention(q_latent: torch.Tensor, q_rope: torch.Tensor, latent_cache: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
                  page_table: torch.Tensor, indices: torch.Tensor | None, sinks: torch.Tensor | None, scale: float,
                  window: int = 0) -> torch.Tensor:  # fmt: skip
    """Causal softmax(scale · (q_latent·c + q_rope·r)) c over the cached (c, r) of each sequence → [T, H, L]; softmax in float32.

    q_latent [T, H, L], q_rope [T, H, R] (R may be 0); latent_cache [N, 1, page_size, L + R]; page_table [S, P]. Every head reads the same
    cache, and what is a key in its first L places is the value too: a kernel reads each cached token once for all heads.
    `scale` is the model's (of the uncompressed head size), not 1/√(L + R). `window` w > 0 sees the last w positions only. With
    `indices` [T, K] int32, token t sees only those positions of its sequence (sparse attention; −1: none, any order, no duplicates). `sinks` [H] are
    extra logits that take probability and carry no value.
    A row of a sequence with seq_len 0 is zero.
    """
    rank = q_latent.shape[-1]
    q = torch.cat([q_latent, q_rope], -1).float()
    out = torch.zeros_like(q_latent, memory_format=torch.contiguous_format)
    starts = cu_seqlens_q.tolist()
    page_size = latent_cache.shape[2]
    for s, length in enumerate(seq_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if length == 0 or begin == end:
            continue
        pages = page_table[s, : -(-length // page_size)].long()
        cached = latent_cache[pages, 0].flatten(0, 1)[:length].float()
        scores = torch.einsum("qhe,ke->hqk", q[begin:end], cached) * scale
        q_pos = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        k_pos = torch.arange(length, device=q.device)[None]
        seen = k_pos <= q_pos
        if window > 0:
            seen = seen & (k_pos > q_pos - window)
        if indices is not None:
            chosen = torch.zeros(end - begin, length + 1, dtype=torch.bool, device=q.device)
            chosen.scatter_(1, torch.where(indices[begin:end] < 0, length, indices[begin:end]).long(), True)
            seen = seen & chosen[:, :length]
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)], -1)
        probabilities = scores.softmax(-1)[..., :length]
        out[begin:end] = torch.einsum("hqk,kl->qhl", probabilities, cached[:, :rank]).to(q_latent.dtype)
    return out


@op("sparse_index(Tensor q, Tensor weights, Tensor index_cache, Tensor cu_seqlens_q, Tensor seq_lens, Tensor page_table, int topk, float scale) -> Tensor",
    fake=lambda q, weights, index_cache, cu_seqlens_q, seq_lens, page_table, topk, scale: q.new_empty((q.shape[0], topk), dtype=torch.int32),
    host_sync=True)  # fmt: skip
def sparse_index(q: torch.Tensor, weights: torch.Tensor, index_cache: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
                 page_table: torch.Tensor, topk: int, scale: float) -> torch.Tensor:  # fmt: skip
    """The `topk` positions p ≤ t with the largest Σ_h weights[t, h] · relu(scale · q[t, h] · k[p]), of equal ones the first → [T, topk] int32.

    They ascend; where there are fewer, −1 follows.
    q [T, J, D] and weights [T, J] of the J heads of the indexer; index_cache [N, 1, page_size, D] holds one k for all of them.
    """
    out = torch.full((q.shape[0], topk), -1, dtype=torch.int32, device=q.device)
    starts = cu_seqlens_q.tolist()
    page_size = index_cache.shape[2]
    for s, length in enumerate(seq_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if length == 0 or begin == end:
            continue
        pages = page_table[s, : -(-length // page_size)].long()
        keys = index_cache[pages, 0].flatten(0, 1)[:length].float()
        scores = torch.relu(torch.einsum("qjd,kd->qjk", q[begin:end].float(), keys) * scale)
        total = torch.einsum("qjk,qj->qk", scores, weights[begin:end].float())
        q_pos = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        total = total.masked_fill(torch.arange(length, device=q.device)[None] > q_pos, float("-inf"))
        best = total.sort(dim=-1, descending=True, stable=True)
        chosen = torch.where(best.values == float("-inf"), length, best.indices)[:, :topk].sort(-1).values
        out[begin:end, : chosen.shape[1]] = torch.where(chosen == length, -1, chosen).int()
    return out
