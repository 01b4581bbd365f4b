"""Which kernel computes each call, and whether it agrees with the reference.

On a GPU that is here, the fastest; else the first by rank, so that equal inputs give equal artifacts wherever they are compiled.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from ingot.artifacts import gate
from ingot.artifacts.bound import Loaded
from ingot.artifacts.check import Check, describe
from ingot.artifacts.gate_record import GateError
from ingot.artifacts.plan import Kernel
from ingot.ops import Graph
from ingot.ops.kernel import Call, Candidate, Source, Steps, claimants
from ingot.ops.target import Target

from .codegen import region
from .measure import seconds
from .plan import Choice, call_of, reference_of
from .variants import VariantSpec

MAX_COPIES = 15
"""Of a call's inputs while it is timed; calls so small that these fit in a cache are timed by their latency, not by memory."""


@dataclass
class Selection:
    """What was chosen: per (call, steps) a Choice; the kernels that the choices use, by name, with their largest errors if they were run."""

    choices: dict[tuple[str, Steps], Choice] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # microseconds of each candidate that passed

    def choose(self, steps: Steps) -> Callable[[fx.Node, Call], Choice]:
        return lambda node, call: self.choices[_key(call, steps)]


def candidates(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """All claims on a call for a target, best rank first."""
    if call.region is not None:
        return region.candidates(call.region, call, steps, target)
    return claimants(call, steps, target)


def load_families(target: Target) -> None:
    """Register the kernel families that generate for a target."""
    importlib.import_module(f"ingot.ops.{'triton' if target.kind == 'cuda' else 'tvm'}").load()


def _key(call: Call, steps: Steps) -> tuple[str, Steps]:
    return repr(call), steps


Emit = Callable[[Iterable[Source]], dict[Source, tuple[Kernel, Loaded | None]]]
"""Compiles sources: the kernel as the artifact records it, and the loaded function when this machine can run it."""


def select(graph: Graph, specs: list[VariantSpec], target: Target, emit: Emit, device: torch.device | None, progress: Callable[[int, int], None]) -> Selection:
    """Choose for every dialect call of `graph` in every variant. `device`: where kernels are gated, and on a GPU timed; None defers it.

    Raises `GateError` when a generated kernel was claimed and none of the claimants agrees with the reference.
    """
    load_families(target)
    wanted: dict[tuple[str, Steps], tuple[Call, Steps, list[Candidate]]] = {}
    for spec in specs:
        for node in graph.fx.nodes:
            call = call_of(graph, node) if node.op == "call_function" else None
            if call is not None and _key(call, spec.steps) not in wanted:
                wanted[_key(call, spec.steps)] = (call, spec.steps, candidates(call, spec.steps, target))
    tried = [c for _, _, found in wanted.values() for c in (found if _measures(device) else found[:1])]
    sources = {launch.source: None for c in tried for launch in c.launches if launch.source.backend != "torch"}
    emitted = emit(sources)
    selection = Selection()
    for i, (key, (call, steps, found)) in enumerate(wanted.items()):
        progress(i, len(wanted))
        choice = selection.choices[key] = _choose(call, steps, found, target, emitted, device, selection)
        if (check := _check(graph, call, steps, choice)) is not None:
            selection.checks.append(check)
    progress(len(wanted), len(wanted))
    return selection


def _choose(call: Call, steps: Steps, found: list[Candidate], target: Target, emitted: dict[Source, tuple[Kernel, Loaded | None]],
            device: torch.device | None, selection: Selection) -> Choice:  # fmt: skip
    if not found and call.region is not None:
        raise GateError(f"no kernel computes {call.op}, which was grouped for {target}; please report this")
    if not found:
        return Choice(None, (), f"no kernel family claims ingot.{call.op} for {target.isa.partition(':')[0]}; its reference runs")
    ranked = f"first of {len(found)} by rank" if len(found) > 1 else "only claimant"
    if device is None:
        return _taken(found[0], emitted, None, ranked, selection)
    passed: list[tuple[float, Candidate, float]] = []
    for candidate in found if _measures(device) else found[:1]:
        kernels = [None if launch.source.backend == "torch" else emitted[launch.source][1] for launch in candidate.launches]
        worst = gate.compare(call, steps, candidate, kernels, device)
        if worst > gate.tolerance(call):
            selection.rejected.append(f"{candidate.name} for ingot.{call.op}: error {worst:.1e}")
        else:
            duration = _duration(call, steps, candidate, kernels, device) if _measures(device) else 0.0
            passed.append((duration, candidate, worst))
    if not passed:
        raise GateError(f"no kernel for {call} agrees with the reference: {'; '.join(selection.rejected[-len(found) :])}; please report this")
    passed.sort(key=lambda p: p[0])
    _, best, worst = passed[0]
    if not _measures(device):
        return _taken(best, emitted, worst, ranked, selection)
    selection.measured.setdefault(f"{call.op} {_weight_shape(call)} T≤{steps.max_tokens}", {c.name: round(d * 1e6, 2) for d, c, _ in passed})
    return _taken(best, emitted, worst, f"fastest of {len(passed)} measured" if len(passed) > 1 else "only claimant", selection)


def _measures(device: torch.device | None) -> bool:
    """Whether candidates are timed; else the first by rank alone is compiled."""
    return device is not None and device.type == "cuda"


def _weight_shape(call: Call) -> str:
    weight = call.args.get("weight")
    return "×".join(map(str, weight.shape)) if hasattr(weight, "shape") else ""


def _taken(candidate: Candidate, emitted: dict[Source, tuple[Kernel, Loaded | None]], error: float | None, reason: str, selection: Selection) -> Choice:
    names = []
    for launch in candidate.launches:
        if launch.source.backend == "torch":
            names.append(launch.source.symbol)
            continue
        kernel = emitted[launch.source][0]
        names.append(kernel.name)
        selection.kernels[kernel.name] = kernel
        if error is not None:
            selection.errors[kernel.name] = max(error, selection.errors.get(kernel.name, 0.0))
    return Choice(candidate, tuple(names), f"{candidate.name}: {reason}")


def _duration(call: Call, steps: Steps, candidate: Candidate, kernels: list[Loaded | None], device: torch.device) -> float:
    """Seconds of the variant's largest step."""
    inputs, sizes = gate.arguments(call, steps, device, steps.max_tokens, seed=1)
    _, run = gate.bind(candidate, call, inputs, sizes, kernels)
    return seconds([run, *_elsewhere(candidate, call, inputs, sizes, kernels, device)])


def _elsewhere(candidate: Candidate, call: Call, inputs: dict[str, object], sizes: dict[str, int], kernels: Sequence[Loaded | None],
               device: torch.device) -> list[Callable[[], None]]:  # fmt: skip
    """The same run on copies of its inputs, enough of them that the cache cannot hold them all: in a step, it holds another layer's."""
    nbytes = sum(v.nbytes for v in inputs.values() if isinstance(v, torch.Tensor))
    copies = min(math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / max(nbytes, 1)), MAX_COPIES)
    made = [{n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()} for _ in range(copies)]
    return [gate.bind(candidate, call, copy, sizes, kernels)[1] for copy in made]


def _check(graph: Graph, call: Call, steps: Steps, choice: Choice) -> Check | None:
    """What compares a choice with its reference once more, wherever the artifact goes; None when nothing was generated."""
    if choice.candidate is None or all(launch.source.backend == "torch" for launch in choice.candidate.launches):
        return None
    reference, returns = ((), ()) if call.region is None else reference_of(graph, call.region)
    return describe(call, steps, choice.candidate, choice.kernels, reference, returns)
