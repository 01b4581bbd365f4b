"""What a step cannot be faster than: the bytes it must read at the memory's bandwidth, the arithmetic it must do at the device's peak."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.manifest import WeightTensor

_DEVICES = {"NVIDIA H200": (4.54e12, 650e12)}
"""Measured: bytes/s read by a plain kernel, bfloat16 flop/s of large matrix products."""
_PROBE_BYTES = 1 << 29


@dataclass(frozen=True)
class Floor:
    """Bounds for one artifact on one device. `flops`, of matrix products in bfloat16, is None where it was never measured."""

    bandwidth: float  # bytes/s
    bandwidth_source: str
    flops: float | None
    weight_bytes: int | None  # read by every step; None when that depends on the tokens (experts)
    matrix_elements: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, artifact: Artifact) -> Floor:
        """Look up the device, or measure the bandwidth of one that is not known."""
        manifest = artifact.manifest
        known = _DEVICES.get(manifest.target.device)
        bandwidth, flops = known or (measure_bandwidth("cuda" if manifest.target.kind == "cuda" else "cpu"), None)
        plan = artifact.plan(manifest.variants[0])
        values = {v.name: v for v in plan.values}
        read: set[str] = set()
        for entry in plan.entries:
            if entry.target != "ingot.embedding":  # it reads a row a token
                read |= {values[a.value].root or a.value for a in entry.args if a.value is not None}
        weights = [w for w in manifest.weights if w.name in read]
        routed = any(e.target in ("ingot.moe", "ingot.grouped_linear") for e in plan.entries)
        return cls(
            bandwidth=bandwidth,
            bandwidth_source="known" if known else "measured",
            flops=flops if manifest.options.dtype == "bfloat16" else None,
            weight_bytes=None if routed else sum(map(_nbytes, weights)),
            matrix_elements=sum(math.prod(w.shape) for w in weights if len(w.shape) == 2),
            kv_bytes_per_token=sum(g.bytes_per_unit // g.page_size for g in manifest.groups if g.page_size),
        )

    def decode_seconds(self, num_seqs: int, context: float) -> float | None:
        """A step of `num_seqs` tokens, each after `context` others."""
        if self.weight_bytes is None:
            return None
        return (self.weight_bytes + num_seqs * context * self.kv_bytes_per_token) / self.bandwidth

    def prefill_seconds(self, num_tokens: int) -> float | None:
        """A prompt's matrix products; of the LM head only one row."""
        if self.weight_bytes is None or self.flops is None:
            return None
        return max(self.weight_bytes / self.bandwidth, 2 * num_tokens * self.matrix_elements / self.flops)


def measure_bandwidth(device: str) -> float:
    """Bytes/s at which `device` reads memory: the best of ten sums over 512 MiB."""
    data = torch.ones(_PROBE_BYTES // 4, dtype=torch.float32, device=device)
    best = math.inf
    for _ in range(10):
        begin = time.perf_counter()
        float(data.sum())
        best = min(best, time.perf_counter() - begin)
    return _PROBE_BYTES / best


def _nbytes(weight: WeightTensor) -> int:
    return math.prod(weight.shape) * getattr(torch, weight.dtype).itemsize
