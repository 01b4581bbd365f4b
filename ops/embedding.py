"""Token embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dialect import op


@op("embedding(Tensor ids, Tensor weight) -> Tensor", fake=lambda ids, weight: weight.new_empty(*ids.shape, weight.shape[1]), rowwise=True)
def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows ids [T] (int32 or int64) of weight [V, D] → [T, D]."""
    return F.embedding(ids, weight)
