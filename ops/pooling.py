"""One vector from the tokens of each sequence. T tokens, S sequences, D hidden."""

from __future__ import annotations

from itertools import pairwise

import torch

from .dialect import op


@op("pool(Tensor x, Tensor cu_seqlens_q, Tensor pooling) -> Tensor",
    fake=lambda x, cu_seqlens_q, pooling: x.new_empty(pooling.shape[0], x.shape[1], dtype=torch.float32), host_sync=True)  # fmt: skip
def pool(x: torch.Tensor, cu_seqlens_q: torch.Tensor, pooling: torch.Tensor) -> torch.Tensor:
    """x [T, D] of sequences delimited by `cu_seqlens_q` [S+1], pooled as `pooling` [S] says → float32 [S, D]; zeros for an empty one.

    0: the mean over the sequence's tokens; 1: its first token; 2: its last.
    """
    out = x.new_zeros(pooling.shape[0], x.shape[1], dtype=torch.float32)
    for s, ((begin, end), how) in enumerate(zip(pairwise(cu_seqlens_q.tolist()), pooling.tolist(), strict=True)):
        if begin < end:
            rows = x[begin:end].float()
            out[s] = (rows.mean(0), rows[0], rows[-1])[how]
    return out
