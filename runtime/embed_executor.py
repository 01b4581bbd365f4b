"""The executor of an encoder: packed texts in, pooled embeddings out. It owns the device: weights, arena, plans."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from ingot.artifacts import weights
from ingot.artifacts.artifact import Artifact
from ingot.artifacts.bound import load
from ingot.artifacts.plan import Variant
from ingot.artifacts.settings import settings

from .bind import BoundPlan, bind, tickets
from .executor import BOUND_PLANS, Progress


class EmbedExecutor:
    """Runs the artifact's plans on this machine's device; on a CPU with `num_threads` threads."""

    def __init__(self, artifact: Artifact, num_threads: int | None, progress: Progress) -> None:
        manifest = artifact.manifest
        if manifest.target.kind == "cpu":
            torch.set_num_threads(num_threads or settings().num_threads)
        self._device = torch.device("cuda" if manifest.target.kind == "cuda" else "cpu")
        self._variants = sorted((artifact.plan(name) for name in manifest.variants), key=lambda v: v.max_tokens)
        used = {e.kernel for v in self._variants for e in v.entries if e.backend != "torch"}
        self._kernels = {k.name: load(k, artifact.path(k.file)) for k in manifest.kernels if k.name in used}
        progress("load weights", 0.0)
        self._roots = weights.load(artifact, self._device, progress=lambda done, of: progress("load weights", done / max(of, 1)))
        tokens, seqs = manifest.options.max_num_batched_tokens, manifest.options.max_num_seqs
        for name, size in (("input_ids", tokens), ("positions", tokens), ("cu_seqlens_q", seqs + 1), ("pooling", seqs)):
            self._roots[name] = torch.zeros(size, dtype=torch.int32, device=self._device)
        self._roots |= tickets(self._variants, self._device)
        self._arena = torch.empty(max(v.arena_bytes for v in self._variants), dtype=torch.uint8, device=self._device)
        self._bound: OrderedDict[tuple[int, int], BoundPlan] = OrderedDict()

    def step(self, texts: Sequence[list[int]], poolings: Sequence[int]) -> np.ndarray:
        """Embeddings [S, D] of texts that fit into one step."""
        lengths = np.array([len(t) for t in texts])
        ends = np.cumsum(lengths)
        inputs = {
            "input_ids": np.concatenate([np.asarray(t) for t in texts]),
            "positions": np.arange(ends[-1]) - np.repeat(ends - lengths, lengths),
            "cu_seqlens_q": np.concatenate([[0], ends]),
            "pooling": np.asarray(poolings),
        }
        for name, values in inputs.items():
            self._roots[name][: len(values)].copy_(torch.from_numpy(values.astype(np.int32)))
        plan = self._bind(int(ends[-1]), len(texts))
        plan.run()
        return plan.results[0].cpu().numpy()

    def _bind(self, tokens: int, seqs: int) -> BoundPlan:
        key = (tokens, seqs)
        if key not in self._bound:
            self._bound[key] = bind(self._variant(tokens, seqs), {"T": tokens, "S": seqs}, self._roots, self._arena, self._kernels, self._device)
            if len(self._bound) > BOUND_PLANS:
                self._bound.popitem(last=False)
        self._bound.move_to_end(key)
        return self._bound[key]

    def _variant(self, tokens: int, seqs: int) -> Variant:
        return next(v for v in self._variants if tokens <= v.max_tokens and seqs <= v.max_seqs)
