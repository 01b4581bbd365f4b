"""Which kernel computes each call: measured where the device is, ranked where it is not, and gated either way."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from ingot.artifacts.bound import Loaded
from ingot.artifacts.plan import Kernel
from ingot.ops import Graph
from ingot.ops.kernel import Call, Candidate, Source, Steps, claimants
from ingot.ops.target import Target

from . import gate
from .codegen import region
from .plan import Choice, call_of
from .random_inputs import random_inputs, step_sizes
from .variants import VariantSpec

MAX_COPIES = 15
"""Of a call's inputs while it is timed; calls so small that these fit in a cache are timed by their latency, not by memory."""


@dataclass
class Selection:
    """What was chosen: per (call, steps) a Choice, and the kernels that the choices use, by name."""

    choices: dict[tuple[str, Steps], Choice] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
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
    """Choose for every dialect call of `graph` in every variant. `device`: where kernels are gated and timed; None defers both.

    Raises `gate.GateError` when a generated kernel was claimed and none of the claimants agrees with the reference.
    """
    load_families(target)
    wanted: dict[tuple[str, Steps], tuple[Call, Steps, list[Candidate]]] = {}
    for spec in specs:
        for node in graph.fx.nodes:
            call = call_of(graph, node) if node.op == "call_function" else None
            if call is not None and _key(call, spec.steps) not in wanted:
                wanted[_key(call, spec.steps)] = (call, spec.steps, candidates(call, spec.steps, target))
    sources = {launch.source: None for _, _, found in wanted.values() for c in found for launch in c.launches if launch.source.backend != "torch"}
    emitted = emit(sources)
    selection = Selection()
    for i, (key, (call, steps, found)) in enumerate(wanted.items()):
        progress(i, len(wanted))
        selection.choices[key] = _choose(call, steps, found, target, emitted, device, selection)
    progress(len(wanted), len(wanted))
    return selection


def _choose(call: Call, steps: Steps, found: list[Candidate], target: Target, emitted: dict[Source, tuple[Kernel, Loaded | None]],
            device: torch.device | None, selection: Selection) -> Choice:  # fmt: skip
    if not found and call.region is not None:
        raise gate.GateError(f"no kernel computes {call.op}, which was grouped for {target}; please report this")
    if not found:
        return Choice(None, (), f"no kernel family claims ingot.{call.op} for {target.isa.partition(':')[0]}; its reference runs")
    if device is None:
        return _taken(found[0], emitted, "deferred", "first by rank: no device to measure on", selection)
    passed: list[tuple[float, Candidate, float]] = []
    for candidate in found:
        worst, duration = _try(call, steps, candidate, emitted, device)
        if worst > gate.TOLERANCE[_precision(call)]:
            selection.rejected.append(f"{candidate.name} for ingot.{call.op}: error {worst:.1e}")
        else:
            passed.append((duration, candidate, worst))
    if not passed:
        raise gate.GateError(f"no kernel for {call} agrees with the reference: {'; '.join(selection.rejected[-len(found) :])}; please report this")
    passed.sort(key=lambda p: p[0])
    _, best, worst = passed[0]
    # times go to the report, which the digest leaves out: two builds of one input should be equal
    selection.measured.setdefault(f"{call.op} {_weight_shape(call)} T≤{steps.max_tokens}", {c.name: round(d * 1e6, 2) for d, c, _ in passed})
    reason = f"fastest of {len(passed)} measured" if len(passed) > 1 else "only claimant"
    return _taken(best, emitted, f"passed({device.type}, {worst:.1e})", reason, selection)


def _weight_shape(call: Call) -> str:
    weight = call.args.get("weight")
    return "×".join(map(str, weight.shape)) if hasattr(weight, "shape") else ""


def _taken(candidate: Candidate, emitted: dict[Source, tuple[Kernel, Loaded | None]], verdict: str, reason: str, selection: Selection) -> Choice:
    names = []
    for launch in candidate.launches:
        if launch.source.backend == "torch":
            names.append(launch.source.symbol)
            continue
        kernel = emitted[launch.source][0]
        names.append(kernel.name)
        known = selection.kernels.get(kernel.name)
        selection.kernels[kernel.name] = known if known is not None and known.gate > verdict else _with_gate(kernel, verdict)
    return Choice(candidate, tuple(names), f"{candidate.name}: {reason}")


def _with_gate(kernel: Kernel, verdict: str) -> Kernel:
    return Kernel(**{f: getattr(kernel, f) for f in kernel.__struct_fields__} | {"gate": verdict})


def _try(call: Call, steps: Steps, candidate: Candidate, emitted: dict[Source, tuple[Kernel, Loaded | None]], device: torch.device) -> tuple[float, float]:
    """(worst error over a small ragged step, seconds of the largest step)."""
    kernels = [None if launch.source.backend == "torch" else emitted[launch.source][1] for launch in candidate.launches]
    sizes = step_sizes(steps, 37)
    inputs = random_inputs(call, steps, sizes, device, seed=sum(map(ord, call.op)))
    sizes |= _group_sizes(call, inputs)
    before = {n: inputs[n].clone() for n in gate.states(call)}
    outputs, run = gate.bind(candidate, call, inputs, sizes, kernels)
    run()
    worst = gate.error(call, inputs, outputs, before)
    if steps.max_tokens > sizes["T"]:
        sizes = step_sizes(steps, steps.max_tokens)
        inputs = random_inputs(call, steps, sizes, device, seed=1)
        sizes |= _group_sizes(call, inputs)
        _, run = gate.bind(candidate, call, inputs, sizes, kernels)
    return worst, gate.seconds([run, *_elsewhere(candidate, call, inputs, sizes, kernels, device)], device)


def _elsewhere(candidate: Candidate, call: Call, inputs: dict[str, object], sizes: dict[str, int], kernels: Sequence[Loaded | None],
               device: torch.device) -> list[Callable[[], None]]:  # fmt: skip
    """The same run on copies of its inputs, enough of them that a GPU's cache cannot hold them all: in a step, it holds another layer's."""
    if device.type != "cuda":
        return []
    nbytes = sum(v.nbytes for v in inputs.values() if isinstance(v, torch.Tensor))
    copies = min(math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / max(nbytes, 1)), MAX_COPIES)
    made = [{n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()} for _ in range(copies)]
    return [gate.bind(candidate, call, copy, sizes, kernels)[1] for copy in made]


def _group_sizes(call: Call, inputs: dict[str, object]) -> dict[str, int]:
    """N and P of the groups, from the tensors that have them."""
    sizes = {}
    for name, arg in call.args.items():
        for d, n in zip(getattr(arg, "shape", ()), getattr(inputs[name], "shape", ()), strict=True):
            if isinstance(d, dict) and len(d) == 1:
                sizes[next(iter(d))] = n
    return {k: v for k, v in sizes.items() if k not in ("T", "S", "R")}


def _precision(call: Call) -> torch.dtype:
    """The coarsest floating dtype among arguments and results."""
    dtypes = {t.dtype for t in (*call.args.values(), *call.results) if hasattr(t, "dtype")}
    return next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), torch.float32)
