"""One vector from the tokens of each sequence. T tokens, S sequences, D hidden."""

from __future__ import annotations

from itertools import pairwise

import torch

from .dialect import op

POOLINGS = ("mean", "cls", "last")
"""What the step input `pooling` may say, by index: the mean over a sequence's tokens, its first token, its last one."""


@op("pool(Tensor x, Tensor cu_seqlens_q, Tensor pooling) -> Tensor",
    fake=lambda x, cu_seqlens_q, pooling: x.new_empty(pooling.shape[0], x.shape[1], dtype=torch.float32), host_sync=True)  # fmt: skip
def pool(x: torch.Tensor, cu_seqlens_q: torch.Tensor, pooling: torch.Tensor) -> torch.Tensor:
    """x [T, D] of sequences delimited by `cu_seqlens_q` [S+1], each pooled as `pooling` [S] says → float32 [S, D]; zeros for an empty one."""
    out = x.new_zeros(pooling.shape[0], x.shape[1], dtype=torch.float32)
    for s, ((begin, end), how) in enumerate(zip(pairwise(cu_seqlens_q.tolist()), pooling.tolist(), strict=True)):
        if begin < end:
            rows = x[begin:end].float()
            out[s] = (rows.mean(0), rows[0], rows[-1])[how]
    return out
