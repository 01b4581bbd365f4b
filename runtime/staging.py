"""How a step gets to its device: one copy from page-locked memory, two small launches, nothing waited for."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import torch

from .batch import StepBatch, StepLayout, StepSize

_BUFFERS = 3
"""Host buffers in rotation: one is packed while the steps before it may still be copied."""
_KEPT = 64
"""Batches whose views are kept; steps of a size seen before cost no views."""


class _Views(NamedTuple):
    """Of a batch, what its upload reads and writes: made once, since a view costs as much as a launch."""

    host: torch.Tensor
    device: torch.Tensor
    token_sources: torch.Tensor
    input_ids: torch.Tensor
    page_tables: list[tuple[torch.Tensor, torch.Tensor]]


class Staging:
    """The host's buffers, and what kernels read: the step's buffer, `input_ids` [T] and full page tables [S, P] by group.

    In memory the last step's samples come before the step's buffer: `token_sources` are indices into both.
    """

    def __init__(self, layout: StepLayout, largest: StepSize, device: torch.device) -> None:
        self._layout = layout
        length, cuda = layout.length(largest), device.type == "cuda"
        self._host = [torch.zeros(length, dtype=torch.int32, pin_memory=cuda) for _ in range(_BUFFERS)]
        self._copied = [torch.cuda.Event() for _ in self._host] if cuda else []
        self._slot = 0
        self._batches: OrderedDict[tuple[int, StepSize], tuple[StepBatch, _Views]] = OrderedDict()
        self._memory = torch.zeros(layout.num_samples + length, dtype=torch.int32, device=device)
        self.buffer = self._memory[layout.num_samples :]
        self.input_ids = torch.zeros(largest.num_tokens, dtype=torch.int32, device=device)
        self._page_tables = {f"page_table_{g}": torch.zeros(largest.num_seqs, p, dtype=torch.int32, device=device) for g, _, p in layout.page_groups}

    def batch(self, size: StepSize, padded: StepSize) -> StepBatch:
        """A batch in the next host buffer; waits only if that one has not been copied yet."""
        self._slot = (self._slot + 1) % len(self._host)
        if self._copied:
            self._copied[self._slot].synchronize()
        key = (self._slot, padded)
        if key not in self._batches:
            batch = StepBatch(self._layout, size, padded, self._host[self._slot].numpy())
            self._batches[key] = batch, self._views(batch)
            if len(self._batches) > _KEPT:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        batch, _ = self._batches[key]
        batch.reset(size)
        return batch

    def upload(self, batch: StepBatch) -> None:
        """Enqueue the copy of the batch that `batch` returned last, and make input ids and page tables of it."""
        _, views = self._batches[self._slot, batch.padded]
        views.device.copy_(views.host, non_blocking=True)
        if self._copied:
            self._copied[self._slot].record()
        torch.index_select(self._memory, 0, views.token_sources, out=views.input_ids)
        for table, packed in views.page_tables:
            table.copy_(packed)

    def _views(self, batch: StepBatch) -> _Views:
        def view(name: str) -> torch.Tensor:
            field = batch.fields[name]
            return self.buffer[field.offset : field.offset + math.prod(field.shape)].view(field.shape)

        tables = [(table[: view(name).shape[0], : view(name).shape[1]], view(name)) for name, table in self._page_tables.items()]
        host, device = self._host[self._slot][: batch.buffer.size], self.buffer[: batch.buffer.size]
        return _Views(host, device, view("token_sources"), self.input_ids[: batch.padded.num_tokens], tables)

    def inputs(self, size: StepSize) -> dict[str, torch.Tensor]:
        """Where a plan reads a step padded to `size`; T, S and R decide."""
        fields = self._layout.fields(size)
        views = {name: self.buffer[f.offset : f.offset + math.prod(f.shape)] for name, f in fields.items()}
        return views | self._page_tables | {"input_ids": self.input_ids}

    def keep(self, token_ids: torch.Tensor) -> None:
        """Keep a step's samples [R] for the next one; where logits were not finite 0, a token like any other, stands for it."""
        samples = token_ids[: self._layout.num_samples]
        torch.clamp(samples, min=0, out=self._memory[: samples.numel()])
