"""Indexers of sparse attention (DeepSeek-AI 2025): for each token, the positions that latent attention may see."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..swaps.context import current
from . import adapts

_ingot = torch.ops.ingot


def _index(self: Any, hidden_states: torch.Tensor, q_resid: torch.Tensor, tables: Any, rotation: str, rotated_last: bool) -> torch.Tensor:
    """Indices [1, T, index_topk] int32. The indexer's keys have a cache beside the latents'."""
    rotate, width = getattr(sys.modules[type(self).__module__], rotation), self.qk_rope_head_dim
    q = self.wq_b(q_resid).unflatten(-1, (self.n_heads, self.head_dim))
    k = self.k_norm(self.wk(hidden_states).to(self.k_norm.weight.dtype)).to(hidden_states.dtype).unsqueeze(2)
    begin = self.head_dim - width if rotated_last else 0
    turned = rotate(q[..., begin : begin + width], k[..., begin : begin + width], *tables, unsqueeze_dim=2)
    rest = [x[..., :begin] if rotated_last else x[..., width:] for x in (q, k)]
    q, k = (torch.cat([r, t] if rotated_last else [t, r], -1) for r, t in zip(rest, turned, strict=True))
    weights = self.weights_proj(hidden_states.to(self.weights_proj.weight.dtype)).float() * self.n_heads**-0.5
    context = current()
    (name,) = context.declare(index_cache=context.latent_page(int(k.shape[-1]), k.dtype))
    if context.observing:
        return q.new_empty((1, q.shape[1], self.index_topk), dtype=torch.int32)
    step = context.values
    step[name] = _ingot.latent_write(k[0, :, 0], None, step[name], step["slot_mapping_latent"])
    chosen = _ingot.sparse_index(q[0], weights[0], step[name], step["cu_seqlens_q"], step["seq_lens"], step["page_table_latent"],
                                 self.index_topk, self.softmax_scale)  # fmt: skip
    return chosen.unsqueeze(0)


@adapts("deepseek_v32.DeepseekV32Indexer", "axk2.AXK2Indexer")
def indexer(self: Any, hidden_states: torch.Tensor, q_resid: torch.Tensor, position_embeddings: Any, *others: Any, **kwargs: Any) -> torch.Tensor:
    return _index(self, hidden_states, q_resid, position_embeddings, "apply_rotary_pos_emb", rotated_last=False)


@adapts("glm_moe_dsa.GlmMoeDsaIndexer", "dots3_note.Dots3NoteTextIndexer")
def interleaved(self: Any, hidden_states: torch.Tensor, q_resid: torch.Tensor, position_embeddings: Any, *others: Any, **kwargs: Any) -> torch.Tensor:
    return _index(self, hidden_states, q_resid, position_embeddings, "apply_rotary_pos_emb_interleave", rotated_last=False)


@adapts("hy_v4.HYV4Indexer")
def last(self: Any, hidden_states: torch.Tensor, q_resid: torch.Tensor, position_embeddings: Any, *others: Any, **kwargs: Any) -> torch.Tensor:
    return _index(self, hidden_states, q_resid, position_embeddings, "apply_rotary_pos_emb", rotated_last=True)
