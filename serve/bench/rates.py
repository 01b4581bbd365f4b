"""What a device can do: bytes read a second and arithmetic a second, known from measurements or measured now."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Rates:
    """`bandwidth` in bytes/s that a plain kernel reads; `flops` in flop/s of large matrix products in `dtype`, `codes` of those of 8-bit codes by their kind
    ("fp8", "int8"). `source`: "known" or "measured"."""

    bandwidth: float
    flops: float
    source: str
    codes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, device: str, dtype: str, kinds: Collection[str] = ()) -> Rates:
        """Of a device by its name, where they were measured before; of this machine's otherwise, measured now. `kinds`: of codes that are multiplied."""
        known = _KNOWN.get((device, dtype))
        if known is not None and known.codes.keys() >= set(kinds):
            return known
        return measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, dtype), kinds)


_KNOWN = {("NVIDIA H200", "bfloat16"): Rates(4.54e12, 650e12, "known", {"fp8": 1240e12})}


def measure(device: torch.device, dtype: torch.dtype, kinds: Collection[str] = ()) -> Rates:
    """Of this machine's device, now."""
    rates = Rates(_bandwidth(device), _flops(device, dtype), "measured")
    rates = replace(rates, codes={kind: _code_flops(device, kind) for kind in sorted(kinds)})
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the KV cache is sized by what is free
    return rates


def _bandwidth(device: torch.device) -> float:
    """Of sums and norms over a buffer that no cache holds."""
    data = torch.ones((4 << 30 if device.type == "cuda" else 1 << 29) // 4, dtype=torch.float32, device=device)
    return data.nbytes / min(_best(data.sum, device), _best(lambda: torch.linalg.vector_norm(data), device))


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    """Of a square product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), device)


def _code_flops(device: torch.device, kind: str) -> float:
    """Of a square product of random codes of a kind."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
    if kind == "int8":
        return 2 * n**3 / _best(lambda: torch._int_mm(a, b.t()), device)
    x, y, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
    return 2 * n**3 / _best(lambda: torch._scaled_mm(x, y.t(), one, one, out_dtype=torch.bfloat16), device)


def _best(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of the fastest run, without what a launch costs."""
    run()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return min(seconds)
