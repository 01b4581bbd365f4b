"""Memory is planned, not profiled: the manifest says what weights, arena and a page take, and the rest becomes pages."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from ingot.artifacts.artifact import Artifact
from ingot.ops.errors import IngotError

CPU_CACHE_BYTES = 4 << 30
"""The KV cache takes at most this much on a CPU, and at most half of what is free."""
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
    cache_bytes: int


def plan_memory(artifact: Artifact, arena_bytes: int, *, max_model_len: int | None, utilization: float, num_pages: int | None) -> MemoryPlan:
    """Divide the device's memory. `num_pages` overrides the number of pages of each page group.

    Raises MemoryPlanError when weights and arena leave no room, or a sequence of `max_model_len` tokens does not fit the pages.
    """
    manifest = artifact.manifest
    weight_bytes = sum(torch.empty(0, dtype=getattr(torch, w.dtype)).itemsize * _numel(w.shape) for w in manifest.weights)
    slots = manifest.options.max_num_seqs
    slot_bytes = sum(g.bytes_per_unit * slots for g in manifest.groups if g.kind == "slot")
    paged = [g for g in manifest.groups if g.kind == "page"]
    page_bytes = sum(g.bytes_per_unit for g in paged)
    page_size = paged[0].page_size if paged else 1
    longest = min(max_model_len or manifest.model.max_model_len, manifest.model.max_model_len)
    if max_model_len is not None and max_model_len > manifest.model.max_model_len:
        raise MemoryPlanError(f"--max-model-len {max_model_len} is more than the {manifest.model.max_model_len} positions that {manifest.model.name} has")
    free, where = _free(artifact.manifest.target.kind, utilization, weight_bytes)
    room = free - weight_bytes - arena_bytes - slot_bytes
    wanted = slots * -(-longest // page_size)
    if paged and num_pages is None:
        num_pages = min(wanted, room // page_bytes) if room > 0 else 0
    capacity = (num_pages or 0) * page_size
    if room < 0 or (paged and capacity < min(longest, LEAST_TOKENS)):
        need = weight_bytes + arena_bytes + slot_bytes + page_bytes * -(-min(longest, LEAST_TOKENS) // page_size)
        raise MemoryPlanError(
            f"{manifest.model.name} does not fit: weights {_gb(weight_bytes)}, arena {_gb(arena_bytes)} and the smallest cache need {_gb(need)}, "
            f"{where} has {_gb(free)} for it: {_gb(need - free)} are missing; compile with a smaller --max-num-batched-tokens or quantize"
        )
    if paged and capacity < longest:
        if max_model_len is not None:
            short = (longest - capacity) * page_bytes // page_size
            raise MemoryPlanError(
                f"a sequence of --max-model-len {longest} tokens takes {_gb(longest * page_bytes // page_size)} of KV cache, "
                f"{_gb(short)} more than {where} has left; use --max-model-len {capacity} or less"
            )
        longest = capacity
    units = {g.name: (slots if g.kind == "slot" else num_pages or 0) for g in manifest.groups}
    return MemoryPlan(units, longest, weight_bytes, arena_bytes, sum(g.bytes_per_unit * units[g.name] for g in manifest.groups))


def _free(kind: str, utilization: float, weight_bytes: int) -> tuple[int, str]:
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        return int(min(free, total * utilization)) - CUDA_RESERVE_BYTES, torch.cuda.get_device_name()
    available = psutil.virtual_memory().available
    return weight_bytes + min(CPU_CACHE_BYTES, (available - weight_bytes) // 2), "this machine"


def _numel(shape: tuple[int, ...]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"
