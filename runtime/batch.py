"""StepBatch: what one step computes, as arrays in a single flat int32 buffer.

One buffer means one copy to a device and one message to a worker. In it every array starts at a multiple of 64
bytes, which is what kernels may rely on. Names are those of the graph's step inputs (ARCHITECTURE.md, Contracts).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from .kv_cache import KVCache
from .request import SamplingParams
from .scheduler import Scheduled

_ALIGN = 16  # int32s: 64 bytes
_HEADER = 3  # T, S, R

SAMPLING = np.dtype([("temperature", "f4"), ("top_k", "i4"), ("top_p", "f4"), ("min_p", "f4"), ("seed", "i4", 2), ("num_logprobs", "i4"),
                     ("target", "i4"), ("step", "i4")])  # fmt: skip
"""What is known of each row of logits. temperature 0: greedy; top_k 0: off; `seed` low and high half of 64 bits; num_logprobs −1:
none, 0: of the chosen token; target: the token whose log-probability a prompt row wants, or −1; step: tokens generated before."""
_GREEDY = np.array([(0, 0, 1, 0, (0, 0), -1, -1, 0)], SAMPLING)
_RECORD = struct.Struct("<fiffQiii")


def sampling_record(params: SamplingParams, seed: int) -> bytes:
    """One `SAMPLING` record, its step still 0; `seed` 0 … 2⁶⁴ − 1."""
    temperature = 0.0 if params.greedy else params.temperature
    num_logprobs = -1 if params.logprobs is None else params.logprobs
    return _RECORD.pack(temperature, max(params.top_k, 0), params.top_p, params.min_p, seed, num_logprobs, -1, 0)


class Field(NamedTuple):
    """Where an array lies in the buffer."""

    offset: int  # in int32s
    shape: tuple[int, ...]
    dtype: str  # "int32" or "float32"


@dataclass(frozen=True)
class StepLayout:
    """Which arrays a step has: page groups with the columns P of their page tables, and whether there are state slots."""

    page_groups: tuple[tuple[str, int], ...]
    slots: bool

    @classmethod
    def of(cls, cache: KVCache) -> StepLayout:
        return cls(tuple((name, table.shape[1]) for name, table in cache.page_tables.items()), bool(cache.slot_groups))

    @lru_cache(maxsize=4096)  # noqa: B019  (a layout lives as long as the process)
    def fields(self, num_tokens: int, num_seqs: int, num_rows: int) -> Mapping[str, Field]:
        """Every array of a step of this size. Page tables come last: they are the large part."""
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "input_ids": ((num_tokens,), "int32"),
            "positions": ((num_tokens,), "int32"),
            "cu_seqlens_q": ((num_seqs + 1,), "int32"),
            "seq_lens": ((num_seqs,), "int32"),
            "logits_rows": ((num_rows,), "int32"),
        }
        if self.slots:
            shapes["state_slots"] = ((num_seqs,), "int32")
        for name in SAMPLING.names or ():
            kind = SAMPLING[name]
            shapes[name] = ((num_rows, *kind.shape), "float32" if kind.base == np.float32 else "int32")
        shapes |= {f"slot_mapping_{group}": ((num_tokens,), "int32") for group, _ in self.page_groups}
        shapes |= {f"page_table_{group}": ((num_seqs, columns), "int32") for group, columns in self.page_groups}
        fields, offset = {}, _ALIGN
        for name, (shape, dtype) in shapes.items():
            fields[name] = Field(offset, shape, dtype)
            offset += -(-math.prod(shape) // _ALIGN) * _ALIGN
        return fields

    def size(self, num_tokens: int, num_seqs: int, num_rows: int) -> int:
        """Of the buffer, in int32s."""
        last = list(self.fields(num_tokens, num_seqs, num_rows).values())[-1]
        return last.offset + -(-math.prod(last.shape) // _ALIGN) * _ALIGN


class StepBatch:
    """One step: `buffer` int32, and `arrays`, views of it by name.

    For every page group g, `page_table_<g>` [S, P] (columns past a sequence's pages hold garbage or 0) and `slot_mapping_<g>`
    [T]; `state_slots` [S] if the model has slots; and for each of R rows the fields of `SAMPLING`.
    """

    def __init__(self, layout: StepLayout, num_tokens: int, num_seqs: int, num_rows: int, buffer: np.ndarray | None = None) -> None:
        self.layout = layout
        self.num_tokens, self.num_seqs, self.num_rows = num_tokens, num_seqs, num_rows
        if buffer is None:
            buffer = np.zeros(layout.size(num_tokens, num_seqs, num_rows), np.int32)
            buffer[:_HEADER] = num_tokens, num_seqs, num_rows
        self.buffer = buffer

    @cached_property
    def fields(self) -> Mapping[str, Field]:
        return self.layout.fields(self.num_tokens, self.num_seqs, self.num_rows)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: self.buffer[f.offset : f.offset + math.prod(f.shape)].view(f.dtype).reshape(f.shape) for name, f in self.fields.items()}

    @property
    def max_num_new(self) -> int:
        """The most new tokens that a sequence has."""
        return int(np.diff(self.arrays["cu_seqlens_q"]).max(initial=0))

    def to_bytes(self) -> bytes:
        return self.buffer.tobytes()

    @classmethod
    def from_bytes(cls, layout: StepLayout, data: bytes) -> StepBatch:
        """The batch that `to_bytes` wrote in a process with the same layout."""
        buffer = np.frombuffer(bytearray(data), np.int32)  # of our own, to be written to and wrapped in a tensor
        num_tokens, num_seqs, num_rows = buffer[:_HEADER].tolist()
        return cls(layout, num_tokens, num_seqs, num_rows, buffer)

    def pad_to(self, num_tokens: int, num_seqs: int, num_rows: int) -> StepBatch:
        """The same step with more tokens, sequences and rows, none of which has an effect.

        An added sequence has seq_len 0, slot −1 and one token of id 0 while there are tokens left to give; an added row is
        greedy over row 0. ValueError if one of the sizes is smaller than it is.
        """
        T, S, R = self.num_tokens, self.num_seqs, self.num_rows
        if num_tokens < T or num_seqs < S or num_rows < R:
            raise ValueError(f"a step of {T} tokens, {S} sequences and {R} rows does not fit in {num_tokens}, {num_seqs} and {num_rows}")
        new = StepBatch(self.layout, num_tokens, num_seqs, num_rows)
        for name, array in new.arrays.items():
            old = self.arrays[name]
            array[: len(old)] = old
            if name == "state_slots" or name.startswith("slot_mapping_"):
                array[len(old) :] = -1
            elif name in (SAMPLING.names or ()):
                array[len(old) :] = _GREEDY[name]
        new.arrays["cu_seqlens_q"][S:] = np.minimum(T + np.arange(num_seqs - S + 1), num_tokens)
        return new


def pack(scheduled: list[Scheduled], cache: KVCache, layout: StepLayout) -> StepBatch:
    """The step that computes `scheduled`. Rows of logits: one for each sequence that samples, then everybody's `prompt_rows`."""
    num_new = np.array([n for _, n in scheduled], np.int32)
    computed = np.array([s.num_computed for s, _ in scheduled], np.int32)
    lengths = np.array([len(s.token_ids) for s, _ in scheduled], np.int32)
    rows = np.array([s.row for s, _ in scheduled], np.int32)
    ends = np.cumsum(num_new, dtype=np.int32)
    samples = computed + num_new == lengths
    records = np.frombuffer(b"".join([s.sampling for s, _ in scheduled]), SAMPLING)[samples]  # a copy
    records["step"] = (lengths - np.array([s.num_prompt for s, _ in scheduled], np.int32))[samples]
    prompt_tokens, prompt_records = _prompt_rows(scheduled, (ends - num_new - computed).tolist())
    records = np.concatenate([records, prompt_records])
    T, S = int(ends[-1]), len(scheduled)
    batch = StepBatch(layout, T, S, len(records))
    arrays = batch.arrays
    arrays["input_ids"][:] = list(chain.from_iterable([s.token_ids[s.num_computed : s.num_computed + n] for s, n in scheduled]))
    arrays["cu_seqlens_q"][1:] = ends
    arrays["seq_lens"][:] = computed + num_new
    arrays["logits_rows"][:] = np.concatenate([ends[samples] - 1, prompt_tokens])
    if layout.slots:
        arrays["state_slots"][:] = rows
    for name in SAMPLING.names or ():
        arrays[name][:] = records[name]
    owner = np.repeat(np.arange(S), num_new)
    positions = arrays["positions"]
    positions[:] = np.arange(T, dtype=np.int32) + (computed + num_new - ends)[owner]
    longest = int(arrays["seq_lens"].max())
    for group, _ in layout.page_groups:
        size, table = cache.groups[group].page_size, cache.page_tables[group]
        arrays[f"slot_mapping_{group}"][:] = table[rows[owner], positions // size] * size + positions % size
        used = -(-longest // size)
        arrays[f"page_table_{group}"][:, :used] = table[rows, :used]
    return batch


def _prompt_rows(scheduled: list[Scheduled], shifts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """For everybody's `prompt_rows`: the step's token (position + shift) and the `SAMPLING` record."""
    tokens: list[int] = []
    records = [np.empty(0, SAMPLING)]
    for (seq, num_new), shift in zip(scheduled, shifts, strict=True):
        if seq.wants_prompt_logprobs:
            positions = seq.prompt_rows(num_new)
            record = np.repeat(_GREEDY, len(positions))
            record["num_logprobs"] = seq.request.params.prompt_logprobs
            record["target"] = seq.token_ids[positions.start + 1 : positions.stop + 1]
            records.append(record)
            tokens += [p + shift for p in positions]
    return np.array(tokens, np.int32), np.concatenate(records)


class Sampled(NamedTuple):
    """What a step yields for each of R rows: tensors as the sampler leaves them, numpy arrays as `Executor.step` returns them.

    token_ids [R] int32 (of a prompt row its target; −1 where the logits are not finite); logprobs [R] float32, None if no row
    asked; top_ids and top_logprobs [R, N], best first, N the most that a row asked for, None if that is 0.
    """

    token_ids: Any
    logprobs: Any = None
    top_ids: Any = None
    top_logprobs: Any = None

    def first(self, rows: int) -> Sampled:
        """Without the rows that padding added."""
        return Sampled(*(None if t is None else t[:rows] for t in self))

    def to_host(self) -> Sampled:
        """Tensors to numpy arrays; waits for the device."""
        return Sampled(*(None if t is None else t.cpu().numpy() for t in self))
