"""The numeric gate: a kernel is emitted only after it agreed with its op's reference on the device, or is marked deferred."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ingot.artifacts.bound import Loaded
from ingot.ops import OPS
from ingot.ops.dims import evaluate
from ingot.ops.errors import IngotError
from ingot.ops.kernel import Call, Candidate, Operand, Tensor
from ingot.ops.library import CALLS

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest ‖out − ref‖ / ‖ref‖ against the reference in float32; rounding alone gives 1e-6, 5e-4, 4e-3."""


class GateError(IngotError):
    """No candidate for a call agrees with its reference."""


def bind(
    candidate: Candidate, call: Call, inputs: dict[str, Any], sizes: dict[str, int], kernels: Sequence[Loaded | None]
) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Outputs, poisoned with NaN, and a function that runs the candidate's launches on them. `kernels`: one a launch, None for library calls."""
    device = next(v.device for v in inputs.values() if isinstance(v, torch.Tensor))
    outputs = [_poisoned(t, sizes, device) for t in call.results]
    scratch = [_poisoned(t, sizes, device) for t in candidate.scratch]

    def value(o: Operand) -> Any:
        tensor = inputs[o.arg] if o.arg is not None else outputs[o.out] if o.out is not None else scratch[o.scratch] if o.scratch is not None else None
        if tensor is not None:
            return tensor if o.view is None else tensor.view(o.view)
        return evaluate(o.size, sizes) if o.size is not None else o.const

    runs: list[Callable[[], object]] = []
    for launch, kernel in zip(candidate.launches, kernels, strict=True):
        args = [value(o) for o in launch.operands]
        if launch.source.backend == "torch":
            runs.append(lambda fn=CALLS[launch.source.symbol], a=args: fn(*a))
        else:
            runs.append(kernel.bind(args, tuple(-(-evaluate(d, sizes) // b) for d, b in launch.grid)))

    alive = (inputs, outputs, scratch)  # a launcher knows addresses alone

    def run(alive: object = alive) -> None:
        for r in runs:
            r()

    return outputs, run


def _poisoned(tensor: Tensor, sizes: dict[str, int], device: torch.device) -> torch.Tensor:
    shape = [evaluate(d, sizes) for d in tensor.shape]
    return torch.full(shape, float("nan") if tensor.dtype.is_floating_point else -7, dtype=tensor.dtype, device=device)


def error(call: Call, inputs: dict[str, Any], outputs: list[torch.Tensor], before: dict[str, torch.Tensor]) -> float:
    """Largest relative error of outputs and states against the reference in float32; `before`: the states as they were."""
    changed = states(call)
    exact = {n: v.float() if isinstance(v, torch.Tensor) and v.dtype.is_floating_point else v for n, v in {**inputs, **before}.items()}
    exact = {n: v.clone() if n in changed else v for n, v in exact.items()}
    expected = (OPS[call.op].reference if call.region is None else call.region)(*exact.values())
    expected = list(expected) if isinstance(expected, tuple) else [] if expected is None else [expected]
    pairs = [*zip(outputs, expected, strict=True), *((inputs[n], exact[n]) for n in changed)]
    return max(relative(a, b) for a, b in pairs)


def states(call: Call) -> tuple[str, ...]:
    """The arguments that a call changes."""
    return OPS[call.op].states if call.region is None else ()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖ over the elements where b is finite; infinite when a is not finite at exactly these."""
    if not actual.dtype.is_floating_point:
        return 0.0 if torch.equal(actual.long(), expected.long()) else float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(actual), finite):
        return float("inf")
    a, b = actual[finite].double(), expected[finite].double()
    return float((a - b).norm() / (b.norm() + 1e-30))


def seconds(runs: Sequence[Callable[[], None]], device: torch.device, budget: float = 0.01) -> float:
    """Median time of one of `runs`, which do the same on different memory, over repetitions worth about `budget` seconds."""
    if device.type == "cuda":
        return _cuda_seconds(runs)
    for run in runs:
        run()
    times: list[float] = []
    while sum(times) < budget and len(times) < 50:
        start = time.perf_counter()
        for run in runs:
            run()
        times.append((time.perf_counter() - start) / len(runs))
    return statistics.median(times)


def _cuda_seconds(runs: Sequence[Callable[[], None]]) -> float:
    """As a CUDA graph of at least ten runs, since that is how they will be replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        runs[0]()
    stream.synchronize()
    count = max(10, len(runs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            runs[i % len(runs)]()
    times = []
    for _ in range(5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / count)
    return statistics.median(times)
