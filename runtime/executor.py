"""The executor: a step's batch in, sampled tokens out. It owns the device: weights, states, arena, plans."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch

from ingot.artifacts import weights
from ingot.artifacts.artifact import Artifact
from ingot.artifacts.bound import Loaded, load
from ingot.artifacts.plan import Variant

from .batch import Sampled, StepBatch, StepLayout
from .bind import BoundPlan, bind
from .cuda_graph import CapturedPlan, capture
from .engine import ExecutorInfo, GroupInfo
from .memory import MemoryPlan
from .sampler import SamplingRows, sample

Progress = Callable[[str, float], None]
BOUND_PLANS = 64
"""Step sizes whose plans stay bound; a decode step of a size seen before costs no binding."""


class Executor:
    """Runs the artifact's plans on this machine's device. `memory` says how many pages and slots there are."""

    def __init__(self, artifact: Artifact, plans: dict[str, Variant], memory: MemoryPlan, progress: Progress = lambda stage, done: None) -> None:
        manifest = artifact.manifest
        self.device = torch.device("cuda" if manifest.target.kind == "cuda" else "cpu")
        self._variants = sorted(plans.values(), key=lambda v: (v.max_num_new, v.max_tokens))
        groups = {g.name: GroupInfo(g.kind, g.page_size, memory.num_units[g.name], g.window) for g in manifest.groups}
        self.info = ExecutorInfo(
            groups=groups,
            max_num_seqs=manifest.options.max_num_seqs,
            max_num_batched_tokens=manifest.options.max_num_batched_tokens,
            max_model_len=memory.max_model_len,
            vocab_size=manifest.model.vocab_size,
            max_num_rows=max(v.max_rows for v in plans.values()),
        )
        # modules first: on a nearly full card their first load takes minutes
        used = {e.kernel for v in plans.values() for e in v.entries if e.backend != "torch"}
        self._kernels: dict[str, Loaded] = {k.name: load(k, artifact.path(k.file)) for k in manifest.kernels if k.name in used}
        progress("load weights", 0.0)
        self._roots = weights.load(artifact, self.device, progress=lambda done, of: progress("load weights", done / max(of, 1)))
        for state in manifest.states:
            # zeros, so that no NaN of old memory meets a zero probability
            self._roots[state.name] = torch.zeros(memory.num_units[state.group], *state.shape, dtype=getattr(torch, state.dtype), device=self.device)
        self.layout = StepLayout(
            tuple((n, -(-memory.max_model_len // g.page_size)) for n, g in groups.items() if g.kind == "page"), any(g.kind == "slot" for g in groups.values())
        )
        largest = self.layout.size(self.info.max_num_batched_tokens, self.info.max_num_seqs, max(self.info.max_num_rows, self.info.max_num_seqs))
        self._step_buffer = torch.zeros(largest, dtype=torch.int32, device=self.device)
        self._arena = torch.empty(max(v.arena_bytes for v in plans.values()), dtype=torch.uint8, device=self.device)
        self._bound: OrderedDict[tuple[str, int, int, int], BoundPlan] = OrderedDict()
        self._captured: dict[str, CapturedPlan] = {}
        self._capture(progress)

    def step(self, batch: StepBatch) -> Sampled:
        """Compute the batch's new tokens and sample at its logits rows."""
        logits, staged = self._forward(batch)
        return sample(logits, SamplingRows.from_batch(staged, self._step_buffer)).first(batch.num_rows).to_host()

    def logits(self, batch: StepBatch) -> torch.Tensor:
        """The same step without sampling: logits [R, V] on the device, valid until the next step."""
        return self._forward(batch)[0][: batch.num_rows]

    def captured(self, batch: StepBatch) -> bool:
        """Whether the step is replayed as a CUDA graph."""
        return self._variant(batch).capture

    def _forward(self, batch: StepBatch) -> tuple[torch.Tensor, StepBatch]:
        """Logits and the batch that made them, which may be padded."""
        assert batch.layout == self.layout, "the cache and the executor disagree about page tables"
        variant = self._variant(batch)
        if variant.capture:
            batch = batch.pad_to(variant.max_seqs, variant.max_seqs, variant.max_seqs)
            plan: BoundPlan | CapturedPlan = self._captured[variant.name]
        else:
            plan = self._bind(variant, batch.num_tokens, batch.num_seqs, batch.num_rows)
        # one copy a step: kernels and sampler read their arrays where they lie in the buffer
        self._step_buffer[: batch.buffer.size].copy_(torch.from_numpy(batch.buffer), non_blocking=True)
        plan.run()
        return plan.results[0], batch

    def _variant(self, batch: StepBatch) -> Variant:
        decode = batch.num_tokens == batch.num_seqs == batch.num_rows
        for v in self._variants:
            if v.capture and (not decode or v.name not in self._captured):
                continue
            if batch.num_tokens <= v.max_tokens and batch.num_seqs <= v.max_seqs and batch.max_num_new <= v.max_num_new and batch.num_rows <= v.max_rows:
                return v
        raise ValueError(f"no variant takes {batch.num_tokens} tokens of {batch.num_seqs} sequences with {batch.num_rows} logits rows")

    def _bind(self, variant: Variant, tokens: int, seqs: int, rows: int) -> BoundPlan:
        key = (variant.name, tokens, seqs, rows)
        if key in self._bound:
            self._bound.move_to_end(key)
            return self._bound[key]
        sizes = {"T": tokens, "S": seqs, "R": rows}
        sizes |= {f"N_{n}": g.num_units for n, g in self.info.groups.items()} | {f"P_{n}": c for n, c in self.layout.page_groups}
        inputs = {n: self._step_buffer[f.offset : f.offset + math.prod(f.shape)] for n, f in self.layout.fields(tokens, seqs, rows).items()}
        plan = bind(variant, sizes, self._roots | inputs, self._arena, self._kernels, self.device)
        self._bound[key] = plan
        if len(self._bound) > BOUND_PLANS:
            self._bound.popitem(last=False)
        return plan

    def _capture(self, progress: Progress) -> None:
        """Capture every decode variant, largest first, so that the pool is allocated once."""
        variants = [v for v in reversed(self._variants) if v.capture]
        pool = torch.cuda.graph_pool_handle() if variants else None
        for i, v in enumerate(variants):
            progress("capture CUDA graphs", i / len(variants))
            n = v.max_seqs
            padding = StepBatch(self.layout, 0, 0, 0).pad_to(n, n, n)
            self._step_buffer[: padding.buffer.size].copy_(torch.from_numpy(padding.buffer))
            self._captured[v.name] = capture(self._bind(v, n, n, n), pool)
