"""A step's way to the device and back: copies from page-locked memory, input ids gathered from the last step's samples, one copy to page-locked memory.

Nothing is allocated and nothing waited for. What a step enqueues is bound once a size: a view costs as much as a launch.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ingot.artifacts.launch_cuda import bind_copy

from .batch import Sampled, StepBatch, StepLayout, StepSize

_SLOTS = 3
"""Host buffers in rotation: one is packed while the two steps before it may still be in flight."""
_KEPT = 64
"""Batches whose views are kept; steps of a size seen before cost no views."""
_SOURCES = 8
"""Places whose copy to a batch's tokens stays bound: graphs and plans leave samples where they left those of the step before."""


class _Slot(NamedTuple):
    """What one of the steps in flight has on the host: its buffer, the tokens it samples, and when it is done (on a CPU at once)."""

    buffer: torch.Tensor
    token_ids: torch.Tensor
    done: torch.cuda.Event | None


class _Copies(NamedTuple):
    """Of a batch, bound: to the device its arrays and page tables, to the host, by where they are, the tokens that its step samples."""

    upload: list[Callable[[], object]]
    download: dict[int, Callable[[], object]]
    token_ids: torch.Tensor
    host_token_ids: np.ndarray


@dataclass(frozen=True)
class LaunchedStep:
    """A step that was launched: `samples` are on the host once it is `done`, until the third launch after it."""

    samples: np.ndarray  # `_pack`
    num_rows: int
    done: torch.cuda.Event | None

    def result(self) -> Sampled:
        """Wait for this step alone; numpy arrays [R]."""
        if self.done is not None:
            self.done.synchronize()
        return _unpack(self.samples[: self.num_rows].copy())


class Staging:
    """The host's buffers, and what kernels read: the step's buffer, `input_ids` [T] and full page tables [S, P] by group.

    In memory the last step's samples come before the step's buffer: `token_sources` are indices into both. At most two steps are in flight.
    """

    def __init__(self, layout: StepLayout, largest: StepSize, device: torch.device) -> None:
        self._layout, cuda = layout, device.type == "cuda"
        self._bind_copy = bind_copy if cuda else lambda target, source: lambda: target.copy_(source)
        length = layout.length(largest)

        def host(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, pin_memory=cuda)

        self._slots = [_Slot(host(length), host(largest.num_rows), torch.cuda.Event() if cuda else None) for _ in range(_SLOTS)]
        self._turn = 0
        self._batches: OrderedDict[tuple[int, StepSize], tuple[StepBatch, _Copies]] = OrderedDict()
        self._memory = torch.zeros(layout.num_samples + length, dtype=torch.int32, device=device)
        self.buffer = self._memory[layout.num_samples :]
        self.input_ids = torch.zeros(largest.num_tokens, dtype=torch.int32, device=device)
        self._page_tables = {f"page_table_{g}": torch.zeros(largest.num_seqs, p, dtype=torch.int32, device=device) for g, _, p in layout.page_groups}

    def batch(self, size: StepSize, padded: StepSize) -> StepBatch:
        """A batch in the next slot; waits only if the step that had it before is still in flight."""
        self._turn = (self._turn + 1) % _SLOTS
        slot = self._slots[self._turn]
        if slot.done is not None:
            slot.done.synchronize()
        key = (self._turn, padded)
        if key not in self._batches:
            batch = StepBatch(self._layout, size, padded, slot.buffer.numpy())
            self._batches[key] = batch, self._copies(batch, slot)
            if len(self._batches) > _KEPT:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        batch, _ = self._batches[key]
        batch.reset(size)
        return batch

    def upload(self, batch: StepBatch) -> None:
        """Enqueue the copies of the batch that `batch` returned last."""
        _, copies = self._batches[self._turn, batch.padded]
        for copy in copies.upload:
            copy()

    def gather(self, padded: StepSize) -> Callable[[], object]:
        """What makes the input ids of an uploaded batch."""
        sources, input_ids = self._view(self.buffer, "token_sources", padded), self.input_ids[: padded.num_tokens]
        return lambda: torch.index_select(self._memory, 0, sources, out=input_ids)

    def keep(self, token_ids: torch.Tensor) -> Callable[[], object]:
        """What keeps a step's samples [R] for the next one; where logits were not finite 0, a token like any other, stands for it."""
        samples = token_ids[: self._layout.num_samples]
        place = self._memory[: samples.numel()]
        return lambda: torch.clamp(samples, min=0, out=place)

    def download(self, batch: StepBatch, sampled: Sampled) -> LaunchedStep:
        """Enqueue the copy of what the uploaded batch's step samples at all of its rows."""
        if sampled.logprobs is None:
            _, copies = self._batches[self._turn, batch.padded]
            source = sampled.token_ids.data_ptr()
            if source not in copies.download:
                if len(copies.download) == _SOURCES:
                    copies.download.clear()
                copies.download[source] = self._bind_copy(copies.token_ids, sampled.token_ids)
            copies.download[source]()
            samples = copies.host_token_ids
        else:
            samples = _pack(sampled).to("cpu", non_blocking=True).numpy()  # to page-locked memory
        return LaunchedStep(samples, batch.size.num_rows, self.end())

    def end(self) -> torch.cuda.Event | None:
        """Everything of the uploaded batch's step is enqueued; the event that tells when it is done, None on a CPU."""
        done = self._slots[self._turn].done
        if done is not None:
            done.record()
        return done

    def _copies(self, batch: StepBatch, slot: _Slot) -> _Copies:
        packed = {name: self._view(slot.buffer, name, batch.padded) for name in self._page_tables}
        length = min((table.storage_offset() for table in packed.values()), default=batch.buffer.size)  # page tables come last, and go to their own place
        upload = [self._bind_copy(self.buffer[:length], slot.buffer[:length])]
        upload += [self._bind_copy(self._page_tables[name][: table.shape[0], : table.shape[1]], table) for name, table in packed.items()]
        token_ids = slot.token_ids[: batch.padded.num_rows]
        return _Copies(upload, {}, token_ids, token_ids.numpy())

    def _view(self, buffer: torch.Tensor, name: str, padded: StepSize) -> torch.Tensor:
        field = self._layout.fields(padded)[name]
        return buffer[field.offset : field.offset + math.prod(field.shape)].view(field.shape)

    def inputs(self, size: StepSize) -> dict[str, torch.Tensor]:
        """Where a plan reads a step padded to `size`; T, S and R decide."""
        fields = self._layout.fields(size)
        views = {name: self.buffer[f.offset : f.offset + math.prod(f.shape)] for name, f in fields.items()}
        return views | self._page_tables | {"input_ids": self.input_ids}


def _pack(sampled: Sampled) -> torch.Tensor:
    """Tokens and log-probabilities as one tensor: int32 [R, 2 + 2 · N]."""
    columns = [sampled.token_ids[:, None], sampled.logprobs.view(torch.int32)[:, None]]
    if sampled.top_ids is not None:
        columns += [sampled.top_ids, sampled.top_logprobs.view(torch.int32)]
    return torch.cat(columns, 1)


def _unpack(samples: np.ndarray) -> Sampled:
    """What `_pack` packed, or tokens [R] alone."""
    if samples.ndim == 1:
        return Sampled(samples)
    tokens, logprobs, top = samples[:, 0], samples[:, 1].view(np.float32), samples[:, 2:]
    if not top.size:
        return Sampled(tokens, logprobs)
    count = top.shape[1] // 2
    return Sampled(tokens, logprobs, top[:, :count], top[:, count:].view(np.float32))
