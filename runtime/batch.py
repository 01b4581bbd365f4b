"""StepBatch: what one step computes, as arrays in a single flat int32 buffer.

One buffer means one copy to a device and one message to a worker. In it every array starts at a multiple of 64
bytes, which is what kernels may rely on. Names are those of the graph's step inputs (ARCHITECTURE.md, Contracts), except that
input ids may still be on the device (`token_sources`), and that page tables have only the columns that the step's sequences use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .kv_cache import GroupInfo, KVCache
from .logit_rules import LogitEdits
from .records import GREEDY, SAMPLING, STEP, WORDS
from .request import Sequence
from .rows import Rows
from .scheduler import Step

_ALIGN = 16  # int32s: 64 bytes
TOKENS = _ALIGN
"""Where `token_ids` lie in the buffer, behind its header, of which the last element is 0."""
_HEADER = 8  # the size, T, S and R of the padded size, and how many copies there are
_NO_COPIES = np.empty((0, 3), np.int32)
_LONGEST = 256
"""Tokens by which page tables grow, so that the sizes of steps are few."""


class Field(NamedTuple):
    """An array of the buffer: where it lies, which of T, S and R it is long, and what padding holds (None: garbage)."""

    offset: int  # in int32s
    shape: tuple[int, ...]
    dtype: str  # "int32" or "float32"
    axis: int  # of StepSize
    padding: int | None


class StepSize(NamedTuple):
    """How large a step is: T, S, R, and the tokens of its longest sequence, rounded up."""

    num_tokens: int
    num_seqs: int
    num_rows: int
    longest: int


@dataclass(frozen=True)
class StepLayout:
    """Which arrays a step has: page groups with their page size and the columns P of their page tables; whether there are state
    slots; and how many samples of the step before are kept."""

    page_groups: tuple[tuple[str, int, int], ...]
    slots: bool
    num_samples: int

    @classmethod
    def of(cls, groups: Mapping[str, GroupInfo], max_num_seqs: int, max_model_len: int) -> StepLayout:
        pages = tuple((name, g.page_size, -(-max_model_len // g.page_size)) for name, g in groups.items() if g.kind == "page")
        return cls(pages, any(g.kind == "slot" for g in groups.values()), -(-max_num_seqs // _ALIGN) * _ALIGN)

    @lru_cache(maxsize=4096)  # noqa: B019  (a layout lives as long as the process)
    def fields(self, size: StepSize) -> Mapping[str, Field]:
        """Every array of a step of this size. What depends on T and S comes first, so that plans find it whatever R is, and page tables last."""
        T, S, R, longest = size
        shapes: dict[str, tuple[tuple[int, ...], int, int | None]] = {
            "token_ids": ((T,), 0, 0),
            "token_sources": ((T,), 0, self.num_samples + TOKENS - 1),  # the 0 of the header
            "positions": ((T,), 0, 0),
        }
        shapes |= {f"slot_mapping_{group}": ((T,), 0, -1) for group, _, _ in self.page_groups}
        shapes |= {"cu_seqlens_q": ((S + 1,), 1, None), "seq_lens": ((S,), 1, 0)}
        if self.slots:
            shapes["state_slots"] = ((S,), 1, -1)
        shapes["logits_rows"] = ((R,), 2, 0)
        for name in SAMPLING.names or ():
            shapes[name] = ((R, *SAMPLING[name].shape), 2, {"top_p": 1, "num_logprobs": -1, "target": -1}.get(name, 0))
        shapes |= {f"page_table_{group}": ((S, min(columns, -(-longest // page_size))), 1, None) for group, page_size, columns in self.page_groups}
        fields, offset = {}, TOKENS
        for name, (shape, axis, padding) in shapes.items():
            dtype = "float32" if name in (SAMPLING.names or ()) and SAMPLING[name].base == np.float32 else "int32"
            fields[name] = Field(offset, shape, dtype, axis, padding)
            offset += -(-math.prod(shape) // _ALIGN) * _ALIGN
        return fields

    def length(self, size: StepSize) -> int:
        """Of the buffer, in int32s."""
        last = list(self.fields(size).values())[-1]
        return last.offset + -(-math.prod(last.shape) // _ALIGN) * _ALIGN


class StepBatch:
    """One step of `size`, to be computed as one of size `padded`: `buffer` int32, and `arrays`, views of it by name.

    For every page group g, `page_table_<g>` [S, columns] (past a sequence's pages: garbage) and `slot_mapping_<g>` [T];
    `state_slots` [S] if the model has slots; and for each of R rows the fields of `SAMPLING`. Input ids are the elements
    `token_sources` [T] of the last step's samples [num_samples] with this buffer behind them; `token_ids` [T] are those that are known.
    Apart from the buffer, since few steps have them: `copies` int32 [C, 3], to be made before the step (number of the group, from and to
    page or slot), and `edits`, the rules that requests have for their logits.

    What padding adds has no effect: sequences with seq_len 0, slot −1 and one token of id 0 while there are tokens left to
    give, and rows that are greedy over row 0. It is there from the start, and all tokens are known; the rest is garbage until it is packed.
    """

    def __init__(self, layout: StepLayout, size: StepSize, padded: StepSize | None = None, buffer: np.ndarray | None = None) -> None:
        """`buffer`: memory to use, at least as long as the layout says. ValueError if `padded` is smaller than `size`."""
        self.layout, self.padded = layout, padded or size
        self.fields = layout.fields(self.padded)
        length = layout.length(self.padded)
        self.buffer = np.empty(length, np.int32) if buffer is None else buffer[:length]
        self.arrays = {name: self.buffer[f.offset : f.offset + math.prod(f.shape)].view(f.dtype).reshape(f.shape) for name, f in self.fields.items()}
        begin, end = (self.fields[name].offset for name in ("temperature", "seed"))
        self._words = self.buffer[begin:end].reshape(STEP + 1, -1)  # of records, but the seed: one line a field
        self.buffer[:TOKENS] = 0
        first = layout.num_samples + TOKENS
        self._known = np.arange(first, first + self.padded.num_tokens, dtype=np.int32)
        self.reset(size)

    def reset(self, size: StepSize) -> None:
        """Make this the batch of another step that is padded alike."""
        if any(n > m for n, m in zip(size, self.padded, strict=True)):
            raise ValueError(f"a step of {size} does not fit in {self.padded}")
        self.size = size
        self.edits: LogitEdits | None = None
        self.copies = _NO_COPIES
        self.buffer[:_HEADER] = *size, *self.padded[:3], 0
        T, S, *_ = size
        self.arrays["token_sources"][:T] = self._known[:T]
        starts = self.arrays["cu_seqlens_q"]
        starts[0] = 0
        if size == self.padded:
            return
        starts[S:] = np.minimum(np.arange(T, T + len(starts) - S), self.padded.num_tokens)
        for name, field in self.fields.items():
            if field.padding is not None:
                self.arrays[name][size[field.axis] :] = field.padding

    def sample(self, records: np.ndarray) -> None:
        """`SAMPLING` records of the R rows, as int32 [R, WORDS]."""
        self._words[:, : len(records)] = records[:, : STEP + 1].T
        self.arrays["seed"][: len(records)] = records[:, STEP + 1 :]

    @property
    def plain(self) -> bool:
        """Whether of a packed step only tokens are asked for, and no request has rules."""
        return self.edits is None and not bool((self.arrays["num_logprobs"] >= 0).any())

    def input_ids(self, samples: np.ndarray) -> np.ndarray:
        """[T], by `samples` [num_samples] of the step before."""
        return np.concatenate([samples, self.buffer])[self.arrays["token_sources"]]

    def to_bytes(self) -> bytes:
        self.buffer[_HEADER - 1] = len(self.copies)
        edits = np.empty(0, np.int32) if self.edits is None else self.edits.buffer
        return np.concatenate([self.buffer, self.copies.flat, edits]).tobytes()

    @classmethod
    def from_bytes(cls, layout: StepLayout, data: bytes) -> StepBatch:
        """The batch that `to_bytes` wrote in a process with the same layout."""
        buffer = np.frombuffer(data, np.int32)
        T, S, R, longest, *padded, num_copies = map(int, buffer[:_HEADER])
        batch = cls(layout, StepSize(T, S, R, longest), StepSize(padded[0], padded[1], padded[2], longest))
        batch.buffer[:], copies, edits = np.split(buffer, [batch.buffer.size, batch.buffer.size + 3 * num_copies])
        batch.copies = copies.reshape(-1, 3)
        if edits.size:
            batch.edits = LogitEdits(edits.copy())
        return batch


def size_of(step: Step) -> StepSize:
    longest = int(np.maximum.reduce(step.lengths))
    return StepSize(step.total, len(step.sequences), step.num_rows, -(-longest // _LONGEST) * _LONGEST)


def pack(step: Step, cache: KVCache, batch: StepBatch) -> None:
    """Write `step` into `batch`. Rows of logits: one for each sequence that samples, then everybody's `prompt_rows`."""
    arrays, (T, S, *_) = batch.arrays, batch.size
    rows, lengths = step.rows, step.lengths
    if T == S:
        row_of, positions, ends = rows, step.num_computed, np.arange(1, S + 1)  # of each token
    else:
        ends = np.cumsum(step.num_new)
        row_of, positions = np.repeat(rows, step.num_new), np.arange(T)
        positions += np.repeat(lengths - ends, step.num_new)
    arrays["positions"][:T] = positions
    arrays["cu_seqlens_q"][1 : S + 1] = ends
    arrays["seq_lens"][:S] = lengths
    if batch.layout.slots:
        arrays["state_slots"][:S] = rows
    for group, size, _ in batch.layout.page_groups:
        table, place = cache.page_tables[group], arrays[f"page_table_{group}"]
        page = positions // size
        arrays[f"slot_mapping_{group}"][:T] = (table.take(row_of * table.shape[1] + page) - page) * size + positions
        place[:S] = table[:, : place.shape[1]].take(rows, 0)
    if cache.copies:
        batch.copies = np.array(cache.copies, np.int32)
    _pack_tokens(step, cache, batch, ends, row_of, positions)
    _pack_rows(step, cache, batch, ends)


def _pack_tokens(step: Step, cache: KVCache, batch: StepBatch, ends: np.ndarray, row_of: np.ndarray, positions: np.ndarray) -> None:
    """Tokens that the host knows, and for the others, instead of which there is garbage, the row of the last step's samples."""
    T, pending, sources = batch.size.num_tokens, step.pending >= 0, batch.arrays["token_sources"]
    if len(pending) == T and pending.all():  # as a rule
        sources[:T] = step.pending
        return
    sources[ends[pending] - 1] = step.pending[pending]
    batch.arrays["token_ids"][:T] = cache.rows.tokens[row_of, positions]


def _pack_rows(step: Step, cache: KVCache, batch: StepBatch, ends: np.ndarray) -> None:
    """Which tokens need logits, and what is done with them."""
    R, tokens = batch.size.num_rows, step.sampled(ends) - 1
    records = cache.rows.sampling_words.take(step.sampled(step.rows), 0)
    records[:, STEP] = step.sampled(step.num_tokens - step.num_prompt)
    if step.any_flags & Rows.RULED:
        sequences = [step.sequences[i] for i in np.flatnonzero(step.samples).tolist()]
        batch.edits = LogitEdits.pack(zip(range(len(sequences)), sequences, records[:, STEP].tolist(), strict=True))
    if step.prompt_rows:
        shifts = dict(zip(step.sequences, (ends - step.num_new - step.num_computed).tolist(), strict=True))
        prompt = [(_prompt_records(seq, positions), np.arange(positions.start, positions.stop) + shifts[seq]) for seq, positions in step.prompt_rows]
        records = np.concatenate([records, *(r.view(np.int32).reshape(-1, WORDS) for r, _ in prompt)])
        tokens = np.concatenate([tokens, *(t for _, t in prompt)])
    batch.arrays["logits_rows"][:R] = tokens
    batch.sample(records)


def _prompt_records(seq: Sequence, positions: range) -> np.ndarray:
    """For each of `positions`: greedy, with the next prompt token as the target."""
    records = np.repeat(GREEDY, len(positions))
    records["num_logprobs"] = seq.request.params.prompt_logprobs
    records["target"] = seq.token_ids[positions.start + 1 : positions.stop + 1]
    return records


class Sampled(NamedTuple):
    """What a step yields for each of R rows: tensors as the sampler leaves them, numpy arrays as an executor's result.

    token_ids [R] int32 (of a prompt row its target; negative where there is none: `logit_rules`); logprobs [R] float32, None if no row
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
