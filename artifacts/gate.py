"""The numeric gate: a kernel against its op's reference, on seeded random inputs and the device that it is for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ingot.ops import OPS
from ingot.ops.dims import evaluate
from ingot.ops.kernel import Call, Candidate, Operand, Steps, Tensor, Tickets
from ingot.ops.library import CALLS
from ingot.ops.quantize import LARGEST
from ingot.ops.random_inputs import random_inputs, step_sizes
from ingot.ops.target import check_runs_here, here

from .artifact import Artifact
from .bound import Loaded, load
from .check import read_checks
from .gate_record import GateRecord

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest ‖out − ref‖ / ‖ref‖ against the reference in float32; rounding alone gives 1e-6, 5e-4, 4e-3."""
ROUNDED = 4e-3
"""Where a call rounds to eight bits what it has computed itself: a value may lie on either side of a rounding, of which few do."""
_TOKENS = 37


def run(artifact: Artifact, progress: Callable[[int, int], None] = lambda done, of: None) -> GateRecord:
    """Compare every kernel with its reference on this machine's device, and write the record. TargetError: the device is not here."""
    target = artifact.manifest.target
    check_runs_here(target, f"ingot compile {artifact.manifest.model.name} --target auto")
    machine, device = here(target.kind), torch.device(target.kind)
    assert machine is not None
    checks = read_checks(artifact)
    loaded: dict[str, Loaded] = {k.name: load(k, artifact.path(k.file)) for k in artifact.manifest.kernels}
    errors: dict[str, float] = dict.fromkeys(loaded, 0.0)
    failed: dict[str, str] = {}
    restored = sorted(((check, *check.restore()) for check in checks), key=lambda c: repr(c[1]))
    trials = Trials(device)
    for i, (check, call, candidate) in enumerate(restored):
        progress(i, len(checks))
        worst = trials.of(call, check.steps).error(candidate, [loaded.get(x.kernel) for x in check.launches])
        for kernel in check.kernels:
            errors[kernel] = max(errors[kernel], worst)
            if worst > tolerance(call):
                failed[kernel] = f"error {worst:.1e} in {check.op} of up to {check.steps.max_tokens} tokens, at most {tolerance(call):.0e}"
    progress(len(checks), len(checks))
    record = GateRecord(artifact.manifest.digest, machine.device, errors, failed)
    record.write(artifact)
    return record


class Trials:
    """Of one call after the other, each in several ranges of steps. What a step has no part in, weights above all, is drawn and widened once a call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._call: Call | None = None
        self._drawn: dict[str, torch.Tensor] = {}
        self._exact: dict[str, torch.Tensor] = {}

    def of(self, call: Call, steps: Steps) -> Trial:
        """The trial of a call in steps that a variant may see."""
        if call != self._call:
            self._call, self._drawn, self._exact = call, {}, {}
        inputs, sizes = arguments(call, steps, self._device, _TOKENS, sum(map(ord, call.op)), drawn=self._drawn)
        exact = {n: self._exact[n] if n in self._exact else _widened(v) for n, v in inputs.items()}
        fixed = [n for n, a in call.args.items() if isinstance(a, Tensor) and all(isinstance(d, int) for d in a.shape)]
        self._drawn, self._exact = ({n: values[n] for n in fixed} for values in (inputs, exact))
        return Trial(call, inputs, exact, sizes)


class Trial:
    """One call over a small ragged step of random inputs: any number of candidates, compared with what the reference computed once."""

    def __init__(self, call: Call, inputs: dict[str, Any], exact: dict[str, Any], sizes: dict[str, int]) -> None:
        self.call, self._inputs, self._sizes = call, inputs, sizes
        changed = states(call)
        exact = {n: v.clone() if n in changed else v for n, v in exact.items()}
        results = (OPS[call.op].reference if call.region is None else call.region)(*exact.values())
        self._expected: list[torch.Tensor] = list(results) if isinstance(results, tuple) else [] if results is None else [results]
        self._states = {n: exact[n] for n in changed}

    def error(self, candidate: Candidate, kernels: Sequence[Loaded | None]) -> float:
        """The candidate's largest relative error, of outputs and states. `kernels`: one a launch, None for library calls."""
        inputs = self._inputs | {n: self._inputs[n].clone() for n in self._states}  # a run changes the states
        outputs, run = bind(candidate, self.call, inputs, self._sizes, kernels)
        run()
        pairs = [*zip(outputs, self._expected, strict=True), *((inputs[n], state) for n, state in self._states.items())]
        return max(relative(actual, expected) for actual, expected in pairs)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in TOLERANCE else value


def tolerance(call: Call) -> float:
    """The error that a kernel for this call may have: that of the coarsest floating dtype among arguments and results."""
    dtypes = {t.dtype for t in (*call.args.values(), *call.results) if isinstance(t, Tensor)}
    found = TOLERANCE[next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), torch.float32)]
    return max(found, ROUNDED) if call.op == "quantized_moe" and call.args["activation"] != "none" else found


def arguments(
    call: Call, steps: Steps, device: torch.device, tokens: int, seed: int, context: int = 80, prompts: int = 3,
    drawn: Mapping[str, torch.Tensor] | None = None, others: int | None = None,
) -> tuple[dict[str, Any], dict[str, int]]:  # fmt: skip
    """Random arguments of a step of about `tokens` tokens, of at most so many prompts, after up to `context` cached ones a sequence (but for the
    first one up to `others`), those `drawn` as they are; and its sizes, those of the groups included.
    """
    sizes = step_sizes(steps, tokens, prompts)
    inputs = random_inputs(call, steps, sizes, device, seed, context, drawn, others)
    for name, arg in call.args.items():
        for d, n in zip(getattr(arg, "shape", ()), getattr(inputs[name], "shape", ()), strict=True):
            if isinstance(d, dict) and len(d) == 1 and not d.keys() & {"T", "S", "R"}:
                sizes[next(iter(d))] = n
    return inputs, sizes


def bind(
    candidate: Candidate, call: Call, inputs: dict[str, Any], sizes: dict[str, int], kernels: Sequence[Loaded | None], inplace: bool = False
) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Outputs, poisoned with NaN, and a function that runs the candidate's launches on them. `kernels`: one a launch, None for library calls.

    `inplace`: a result lies in the argument that the candidate may overwrite, so that each run begins with what the last one made.
    """
    device = next(v.device for v in inputs.values() if isinstance(v, torch.Tensor))
    outputs = [_poisoned(t, sizes, device) for t in call.results]
    if inplace and candidate.inplace is not None:
        outputs[0] = inputs[candidate.inplace]
    scratch = [_poisoned(t, sizes, device) for t in candidate.scratch]

    def value(o: Operand) -> Any:
        tensor = inputs[o.arg] if o.arg is not None else outputs[o.out] if o.out is not None else scratch[o.scratch] if o.scratch is not None else None
        if tensor is not None:
            return tensor if o.view is None else tensor.view(o.view)
        if o.pitch is not None:
            return inputs[o.pitch].stride(0)
        return evaluate(o.size, sizes) if o.size is not None else o.const

    runs: list[Callable[[], object]] = []
    for launch, kernel in zip(candidate.launches, kernels, strict=True):
        args = [value(o) for o in launch.operands]
        if launch.source.backend == "torch":
            runs.append(partial(CALLS[launch.source.symbol], *args))
        else:
            assert kernel is not None
            runs.append(kernel.bind(args, tuple(-(-evaluate(d, sizes) // b) for d, b in launch.grid)))

    alive = (inputs, outputs, scratch)  # a launcher knows addresses alone

    def run(alive: object = alive) -> None:
        for r in runs:
            r()

    return outputs, run


def _poisoned(tensor: Tensor, sizes: dict[str, int], device: torch.device) -> torch.Tensor:
    shape = [evaluate(d, sizes) for d in tensor.shape]
    content = 0 if isinstance(tensor, Tickets) else float("nan") if tensor.dtype.is_floating_point else -7
    return torch.full(shape, content, dtype=tensor.dtype, device=device)


def states(call: Call) -> tuple[str, ...]:
    """The arguments that a call changes."""
    return tuple(s for s in OPS[call.op].states if call.args[s] is not None) if call.region is None else ()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖ over the elements where b is finite; infinite when a is not finite at exactly these.

    Indices must be equal; quantized values may fall on either side of a rounding.
    """
    if actual.dtype in LARGEST:
        actual, expected = actual.float(), expected.float()
    if not actual.dtype.is_floating_point:
        return 0.0 if torch.equal(actual.long(), expected.long()) else float("inf")
    distance = _distance(actual, expected)
    if math.isfinite(distance):  # then every element is
        return distance
    finite = torch.isfinite(expected)
    return _distance(actual[finite], expected[finite]) if torch.equal(torch.isfinite(actual), finite) else float("inf")


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    a, b = actual.double(), expected.double()
    return float((a - b).norm() / (b.norm() + 1e-30))
