"""The executor: a step's batch in, sampled tokens out. It owns the device: weights, states, arena, plans."""

from __future__ import annotations

import math
import mmap
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ingot.artifacts import weights
from ingot.artifacts.artifact import Artifact
from ingot.artifacts.bound import Loaded, load
from ingot.artifacts.plan import Variant

from .batch import Sampled, StepBatch, StepLayout, StepSize
from .bind import BoundPlan, bind, tickets
from .compiled_sampler import CompiledSampler
from .cuda_graph import capture
from .kv_cache import GroupInfo
from .memory import MemoryPlan
from .padding import captured_sizes, padded
from .protocol import ExecutorInfo
from .sampler import Sampler
from .staging import LaunchedStep, Staging

Progress = Callable[[str, float], None]
BOUND_PLANS = 256
"""Step sizes whose plans stay bound; a step of a size seen before costs no binding."""


@dataclass(frozen=True)
class _Captured:
    """The first entries of a plan, as a CUDA graph that begins with the step's input ids.

    That of a decode step has all entries; where the artifact has a sampler it chooses and keeps the tokens of all rows too, as if nobody asked for more.
    """

    graph: torch.cuda.CUDAGraph
    num_entries: int
    token_ids: torch.Tensor | None


class Executor:
    """Runs the artifact's plans on this machine's device. `memory` says how many pages and slots there are.

    `asynchronous`: whether an engine may launch a step before it has the samples of the one before; by default on a GPU.
    """

    def __init__(self, artifact: Artifact, plans: dict[str, Variant], memory: MemoryPlan, progress: Progress = lambda stage, done: None,
                 asynchronous: bool | None = None) -> None:  # fmt: skip
        manifest = artifact.manifest
        self.device = torch.device("cuda" if manifest.target.kind == "cuda" else "cpu")
        forward = [v for v in plans.values() if v.entry_point == "forward"]
        sampling = [v for v in plans.values() if v.entry_point == "sample"]
        self._variants = sorted(forward, key=lambda v: (v.max_num_new, v.max_tokens))
        groups = {g.name: GroupInfo(g.kind, g.page_size, memory.num_units[g.name], g.window) for g in manifest.groups}
        self.info = ExecutorInfo(
            groups=groups,
            max_num_seqs=manifest.options.max_num_seqs,
            max_num_batched_tokens=manifest.options.max_num_batched_tokens,
            max_model_len=memory.max_model_len,
            vocab_size=manifest.model.vocab_size,
            max_num_rows=max(v.max_rows for v in forward),
            asynchronous=self.device.type == "cuda" if asynchronous is None else asynchronous,
        )
        # modules first: on a nearly full card their first load takes minutes
        used = {e.kernel for v in plans.values() for e in v.entries if e.backend != "torch"}
        self._kernels: dict[str, Loaded] = {k.name: load(k, artifact.path(k.file)) for k in manifest.kernels if k.name in used}
        progress("load weights", 0.0)
        self._roots = weights.load(artifact, self.device, progress=lambda done, of: progress("load weights", done / max(of, 1)))
        progress("allocate the KV cache", 0.0)
        for state in manifest.states:
            shape = (memory.num_units[state.group], *state.shape)
            self._roots[state.name] = _zeros(shape, getattr(torch, state.dtype), self.device)
        self._roots |= tickets(forward, self.device)
        self._states = [[self._roots[s.name] for s in manifest.states if s.group == g] for g in groups]
        self.layout = StepLayout.of(groups, self.info.max_num_seqs, memory.max_model_len)
        largest = StepSize(self.info.max_num_batched_tokens, self.info.max_num_seqs, max(self.info.max_num_rows, self.info.max_num_seqs), memory.max_model_len)
        self._staging = Staging(self.layout, largest, self.device)
        compiled = CompiledSampler(sampling, self._kernels, self.device) if sampling else None
        self._compiled_sampler = compiled
        self._sampler = Sampler(self.info.max_num_seqs, largest.num_rows, self.info.vocab_size, self.device, compiled)
        self._arena = torch.empty(max(v.arena_bytes for v in forward), dtype=torch.uint8, device=self.device)
        # where a graph cannot hold the plan, references look at sequences one by one, and are spared those that are none
        self._pads = any(v.capture for v in forward)
        self._fixed: dict[str, torch.Tensor] = {}
        self._bound: OrderedDict[tuple[str, StepSize, int], BoundPlan] = OrderedDict()
        self._captured: dict[tuple[str, int, int], _Captured] = {}  # by variant, T and S
        self._places: OrderedDict[tuple[int, int, int], tuple[Variant, StepSize]] = OrderedDict()
        self._capture(progress)

    def batch(self, size: StepSize) -> StepBatch:
        """A batch for the next step, of the size that its variant runs at."""
        _, at = self._place(size)
        return self._staging.batch(size, at._replace(longest=size.longest))

    def launch(self, batch: StepBatch) -> LaunchedStep:
        """Enqueue the batch's step, sampling, and the copy of the samples to the host."""
        logits, token_ids = self._forward(batch)
        if token_ids is not None and batch.plain:  # as a rule
            return self._staging.download(batch, Sampled(token_ids))
        sampled = self._sampler(logits, batch, self._staging.input_ids, self._staging.buffer)
        self._staging.keep(sampled.token_ids)()
        return self._staging.download(batch, sampled)

    def logits(self, batch: StepBatch) -> torch.Tensor:
        """The same step without sampling: logits [R, V] on the device, valid until the next step."""
        logits, _ = self._forward(batch)
        self._staging.end()
        return logits[: batch.size.num_rows]

    def captured(self, size: StepSize) -> bool:
        """Whether a step of this size is replayed as a CUDA graph."""
        variant = self._variant(size)
        return (variant.name, *padded(size, variant)[:2]) in self._captured

    def _forward(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits at every row, those of padding too, and the tokens where a graph chose them."""
        assert batch.layout == self.layout, "the cache and the executor disagree about page tables"
        variant, _ = self._place(batch.size)
        captured = self._captured.get((variant.name, *batch.padded[:2]))
        rest = self._bind(variant, batch.padded, 0 if captured is None else captured.num_entries)
        self._copy(batch.copies)
        self._staging.upload(batch)
        if captured is None:
            rest.run()
            return rest.results[0], None
        captured.graph.replay()
        rest.run()
        return rest.results[0], captured.token_ids

    def _copy(self, copies: np.ndarray) -> None:
        """Pages and slots, as `StepBatch.copies` says; all are read before any is written."""
        for number in np.unique(copies[:, 0]).tolist() if len(copies) else ():
            source, target = (torch.from_numpy(c).to(self.device) for c in copies[copies[:, 0] == number, 1:].astype(np.int64).T.copy())
            for state in self._states[number]:
                content = state.view(torch.uint8)  # whatever its type is
                content.index_copy_(0, target, content[source])

    def _place(self, size: StepSize) -> tuple[Variant, StepSize]:
        """The variant of a step, and the size that it is padded to."""
        key = size[:3]
        if key not in self._places:
            variant = self._variant(size)
            self._places[key] = variant, padded(size, variant) if self._pads else size
            if len(self._places) > BOUND_PLANS:
                self._places.popitem(last=False)
        return self._places[key]

    def _variant(self, size: StepSize) -> Variant:
        decode = size.num_tokens == size.num_seqs
        for v in self._variants:
            if v.decodes and not decode:
                continue
            if size.num_tokens <= v.max_tokens and size.num_seqs <= v.max_seqs and size.num_rows <= v.max_rows:
                return v
        raise ValueError(f"no variant takes {size.num_tokens} tokens of {size.num_seqs} sequences with {size.num_rows} logits rows")

    def _bind(self, variant: Variant, size: StepSize, first: int) -> BoundPlan:
        """The entries from `first` on, for steps padded to `size`."""
        key = (variant.name, size._replace(longest=0), first)  # page tables lie apart
        if key in self._bound:
            self._bound.move_to_end(key)
            return self._bound[key]
        plan = self._bound[key] = self._bind_part(variant, size, slice(first, None))
        if len(self._bound) > BOUND_PLANS:
            self._bound.popitem(last=False)
        return plan

    def _bind_part(self, variant: Variant, size: StepSize, part: slice) -> BoundPlan:
        sizes = {"T": size.num_tokens, "S": size.num_seqs, "R": size.num_rows}
        sizes |= {f"N_{n}": g.num_units for n, g in self.info.groups.items()} | {f"P_{n}": c for n, _, c in self.layout.page_groups}
        plan = bind(variant, sizes, self._roots | self._staging.inputs(size), self._arena, self._kernels, self.device, part, self._fixed)
        return plan if part.start else BoundPlan((self._staging.gather(size), *plan.calls), plan.results)

    def _capture(self, progress: Progress) -> None:
        """Capture every variant at each of its sizes, largest first, so that the pool is allocated once."""
        wanted = sorted(((size, v.decodes, v.name, v) for v in self._variants for size in captured_sizes(v)), reverse=True, key=lambda w: w[:3])
        if not wanted:
            return
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        for i, (size, decodes, name, variant) in enumerate(wanted):
            progress("capture CUDA graphs", i / len(wanted))
            self._staging.upload(self._staging.batch(StepSize(0, 0, 0, 0), size))
            count = len(variant.entries) if decodes else variant.num_before_rows()
            plan, token_ids = self._bind_part(variant, size, slice(0, count)), None
            if decodes and self._compiled_sampler is not None:
                sampling = self._compiled_sampler.bind(plan.results[0], self.layout.fields(size), self._staging.buffer)
                token_ids = sampling.results[0]
                plan = BoundPlan((*plan.calls, *sampling.calls, self._staging.keep(token_ids)), sampling.results)
            self._captured[name, size.num_tokens, size.num_seqs] = _Captured(capture(plan, pool, stream), count, token_ids)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A state at rest: no NaN of old memory may meet a zero probability. On a CPU the system clears a page of memory when it is first touched,
    so that a cache of gigabytes takes neither time nor memory before it is used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
