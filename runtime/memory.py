"""Memory is planned, not profiled: the manifest says what weights, arena and a page take, and what sampling and copies may need; the rest becomes pages."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import psutil
import torch

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.manifest import Manifest
from ingot.artifacts.plan import Entry, Variant
from ingot.ops.dims import evaluate
from ingot.ops.errors import IngotError

from .kv_cache import NO_LIMIT, GroupInfo, capacity
from .logits import processor_bytes
from .sampler import workspace_bytes as sampling_bytes

CPU_CACHE_BYTES = 4 << 30
"""The KV cache takes at most this much on a CPU, and at most half of what is free, unless its size is given."""
CUDA_RESERVE_BYTES = 1 << 30
"""For CUDA's context, modules, graphs and cuBLAS workspaces."""
LEAST_TOKENS = 256


class MemoryPlanError(IngotError):
    """The model does not fit; the message says how much is missing and what would make it fit."""


@dataclass(frozen=True)
class MemoryPlan:
    """How many units each group gets, the longest sequence they hold, and what that takes in bytes."""

    num_units: dict[str, int]
    max_model_len: int
    weight_bytes: int
    arena_bytes: int
    workspace_bytes: int
    cache_bytes: int


def plan_memory(artifact: Artifact, plans: Collection[Variant], *, max_model_len: int | None, utilization: float, num_pages: int | None) -> MemoryPlan:
    """Divide the device's memory between weights, what `plans` and sampling need, and pages. `num_pages` overrides the number of pages of each page group.

    A group with a window holds of each sequence the window and what a step computes, whatever the sequence's length.

    Raises MemoryPlanError when weights and arena leave no room, or a sequence of `max_model_len` tokens does not fit the pages.
    """
    manifest = artifact.manifest
    arena_bytes = sum(max((v.arena_bytes for v in plans if v.entry_point == name), default=0) for name in ("forward", "sample"))
    work_bytes = _workspace(manifest, plans) if manifest.target.kind == "cuda" else 0  # of a CPU's memory half is left alone
    weight_bytes = sum(torch.empty(0, dtype=getattr(torch, w.dtype)).itemsize * math.prod(w.shape) for w in manifest.weights)
    slots = manifest.options.max_num_seqs
    slot_bytes = sum(g.bytes_per_unit * slots for g in manifest.groups if g.kind == "slot")
    paged = [GroupInfo("page", g.page_size, 0, g.window) for g in manifest.groups if g.kind == "page"]
    page_bytes = [g.bytes_per_unit for g in manifest.groups if g.kind == "page"]
    longest = min(max_model_len or manifest.model.max_model_len, manifest.model.max_model_len)
    if max_model_len is not None and max_model_len > manifest.model.max_model_len:
        raise MemoryPlanError(f"--max-model-len {max_model_len} is more than the {manifest.model.max_model_len} positions that {manifest.model.name} has")
    free, where = _free(artifact.manifest.target.kind, utilization, weight_bytes, num_pages is not None)
    room = free - weight_bytes - arena_bytes - work_bytes - slot_bytes
    pages = _Pages(paged, page_bytes, slots, manifest.options.max_num_batched_tokens)
    units = [num_pages] * len(paged) if num_pages is not None else pages.within(room, longest)
    holds = min(longest, pages.capacity(units))
    if num_pages is not None and room >= 0 and pages.bytes(units) > room:
        raise MemoryPlanError(
            f"num_pages {num_pages} takes {_gb(pages.bytes(units))} of KV cache, and {where} has {_gb(room)} left; use {room // sum(page_bytes)} or less"
        )
    if room < 0 or holds < min(longest, LEAST_TOKENS):
        need = weight_bytes + arena_bytes + work_bytes + slot_bytes + pages.bytes(pages.least(min(longest, LEAST_TOKENS)))
        raise MemoryPlanError(
            f"{manifest.model.name} does not fit: weights {_gb(weight_bytes)}, activations {_gb(arena_bytes)}, sampling {_gb(work_bytes)} and the smallest "
            f"cache need {_gb(need)}, {where} has {_gb(free)} for it: {_gb(need - free)} are missing; compile with a smaller --max-num-batched-tokens "
            f"(now {manifest.options.max_num_batched_tokens}) or --max-num-seqs (now {slots}), or quantize"
        )
    if holds < longest and max_model_len is not None:
        wanted = pages.bytes(pages.least(longest))
        raise MemoryPlanError(
            f"a sequence of --max-model-len {longest} tokens takes {_gb(wanted)} of KV cache, "
            f"{_gb(wanted - pages.bytes(pages.least(holds)))} more than {where} has left; use --max-model-len {holds} or less"
        )
    left = iter(units)
    num_units = {g.name: slots if g.kind == "slot" else next(left) for g in manifest.groups}
    return MemoryPlan(num_units, holds, weight_bytes, arena_bytes, work_bytes, slot_bytes + pages.bytes(units))


def _workspace(manifest: Manifest, plans: Collection[Variant]) -> int:
    """What is allocated beside weights, arenas and caches: tables for requests with rules, temporaries of sampling, of copies of pages and of references.

    These come one after the other, so the largest counts.
    """
    seqs, vocab_size = manifest.options.max_num_seqs, manifest.model.vocab_size
    forward = [v for v in plans if v.entry_point == "forward"]
    num_rows = max([seqs, *(v.max_rows for v in forward)])
    copied = [seqs * math.prod(s.shape) * getattr(torch, s.dtype).itemsize for s in manifest.states]  # in one step, of one state
    return processor_bytes(seqs, num_rows, vocab_size) + max([sampling_bytes(vocab_size), *copied, *map(_reference_bytes, forward)])


def _reference_bytes(variant: Variant) -> int:
    """What the largest entry under backend "torch" may allocate. An estimate: what it reads and writes of the step three times in float32."""
    values = {v.name: v for v in variant.values}
    sizes = {"T": variant.max_tokens, "S": variant.max_seqs, "R": variant.max_rows}

    def elements(entry: Entry) -> int:
        used = {n: values[n] for n in (*entry.outputs, *entry.names())}
        return sum(math.prod(evaluate(d, sizes) for d in v.shape) for v in used.values() if v.storage == "arena")

    return max((3 * 4 * elements(e) for e in variant.entries if e.backend == "torch" and not e.kernel), default=0)


@dataclass(frozen=True)
class _Pages:
    """How many pages each of the page groups should have, when a step computes `max_num_new` tokens of at most `max_num_seqs` sequences."""

    groups: list[GroupInfo]
    page_bytes: list[int]
    max_num_seqs: int
    max_num_new: int

    def bytes(self, units: list[int]) -> int:
        return sum(n * size for n, size in zip(units, self.page_bytes, strict=True))

    def capacity(self, units: list[int]) -> int:
        """Tokens of the longest sequence that these pages hold."""
        return capacity([replace(g, num_units=n) for g, n in zip(self.groups, units, strict=True)], self.max_num_new)

    def least(self, num_tokens: int) -> list[int]:
        """What one sequence of `num_tokens` needs."""
        return [g.most_pages(num_tokens, self.max_num_new) for g in self.groups]

    def shared(self, num_tokens: int) -> list[int]:
        """What `num_tokens` need, however many sequences they belong to: of a window no more than all sequences and a step can use."""
        enough = [self.max_num_seqs * g.most_pages(num_tokens, 1) + -(-self.max_num_new // g.page_size) for g in self.groups]
        return [min(-(-num_tokens // g.page_size), n if g.window else NO_LIMIT) for g, n in zip(self.groups, enough, strict=True)]

    def within(self, room: int, longest: int) -> list[int]:
        """The most that `room` bytes hold. Sequences of `longest` tokens come first: windows get less where one would not fit otherwise."""

        def most(units_of: Callable[[int], list[int]], limit: int) -> int:
            return bisect_right(range(limit + 1), room, key=lambda n: self.bytes(units_of(n))) - 1

        shared = self.shared(max(most(self.shared, min(self.max_num_seqs * longest, NO_LIMIT - 2**16)), 0))  # slots have 31 bits
        if self.capacity(shared) >= longest:
            return shared
        least = self.least(max(most(self.least, longest), 0))
        windows = [n - have if g.window else 0 for g, n, have in zip(self.groups, self.shared(self.max_num_seqs * longest), least, strict=True)]
        share = (room - self.bytes(least)) / max(self.bytes(windows), 1)
        return [n + int(more * min(max(share, 0), 1)) for n, more in zip(least, windows, strict=True)]


def _free(kind: str, utilization: float, weight_bytes: int, explicit: bool) -> tuple[int, str]:
    """Bytes to divide, and of what; `explicit`: somebody said how large the cache is."""
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        return int(min(free, total * utilization)) - CUDA_RESERVE_BYTES, torch.cuda.get_device_name()
    available = psutil.virtual_memory().available
    return available if explicit else weight_bytes + min(CPU_CACHE_BYTES, (available - weight_bytes) // 2), "this machine"


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"
