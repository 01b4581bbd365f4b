"""Which kernel computes each call, and whether it agrees with the reference.

The tuning table of the target's device decides; what it lacks, a GPU that is here decides by time, and else the rank, so that equal
inputs (the table is one) give equal artifacts wherever they are compiled.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ingot.artifacts import gate
from ingot.artifacts.bound import Loaded
from ingot.artifacts.check import Check, describe
from ingot.artifacts.gate_record import GateError
from ingot.artifacts.plan import Kernel
from ingot.ops import Graph
from ingot.ops.kernel import Call, Candidate, Source, Steps, claimants
from ingot.ops.target import Target

from .codegen import region
from .layer import LAYERS, Runs, fastest_together, layer_of, near, overlap
from .measure import LONG, WARM, Stopwatch
from .plan import Choice, reference_of
from .tuning import Table, Tuned, fingerprints
from .variants import VariantSpec


@dataclass
class Selection:
    """What was chosen: per (call, steps) a Choice; the kernels that the choices use, by name, with their largest errors if they were run."""

    choices: dict[tuple[str, Steps], Choice] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # microseconds of each candidate that passed
    tuned: dict[str, Tuned] = field(default_factory=dict)  # entries for a tuning table, of what was measured

    def choose(self, steps: Steps) -> Callable[[Call], Choice]:
        return lambda call: self.choices[repr(call), steps]


def candidates(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """All claims on a call for a target, best rank first."""
    if call.region is not None:
        return region.candidates(call.region, call, steps, target)
    return claimants(call, steps, target)


def load_families(target: Target) -> None:
    """Register the kernel families that generate for a target."""
    importlib.import_module(f"ingot.ops.{'triton' if target.kind == 'cuda' else 'tvm'}").load()


Emit = Callable[[Iterable[Source]], Iterable[tuple[Source, tuple[Kernel, Loaded | None]]]]
"""Compiles sources, each given out when it is done: the kernel as the artifact records it, and the loaded function when this machine can run it."""


@dataclass(frozen=True)
class Program:
    """A graph's calls, and the variants in which they are computed."""

    graph: Graph
    calls: Sequence[Call]
    specs: Sequence[VariantSpec]

    @cached_property
    def names(self) -> list[str]:
        """The calls, spelled out."""
        return [repr(call) for call in self.calls]

    @cached_property
    def layer(self) -> list[str]:
        """Those of one layer, in their order."""
        return [self.names[i] for i in layer_of(self.names)]


def select(programs: Iterable[Program], target: Target, emit: Emit, device: torch.device | None, progress: Callable[[int, int], None], table: Table,
           *, measure: bool = False, done: Callable[[str], None] = lambda stage: None) -> Selection:  # fmt: skip
    """Choose for every call in every variant. `device`: where kernels are gated, and on a GPU timed; None defers it. `measure`: on a CPU too.
    `done` is told when a stage ends.

    Equal calls are one: the layers of a model differ in their weights alone. Raises `GateError` when a generated kernel was claimed
    and none of the claimants agrees with the reference.
    """
    load_families(target)
    selector = _Selector(target, emit, device, table, _measures(device, measure))
    return selector.run(programs, progress, done)


def wanted_sources(programs: Iterable[Program], target: Target, device: torch.device | None, table: Table, *, measure: bool = False) -> list[Source]:
    """What `select` would have compiled at first, with the same arguments."""
    load_families(target)
    selector = _Selector(target, lambda sources: (), device, table, _measures(device, measure))
    return _sources(c for program in programs for w in selector.all_wanted(program) for c in w.tried)


def _measures(device: torch.device | None, measure: bool) -> bool:
    return device is not None and (measure or device.type == "cuda")


def _sources(found: Iterable[Candidate]) -> list[Source]:
    return list({launch.source: None for c in found for launch in c.launches if launch.source.backend != "torch"})


@dataclass
class _Wanted:
    """A call of a variant, all candidates for it, and those that come into question, with the reason where it is one."""

    graph: Graph
    call: Call
    name: str  # the call, spelled out
    steps: Steps
    layer: str  # of whose calls it is one, spelled out; "" if kernels are not chosen among their layer's others
    found: list[Candidate]
    tried: list[Candidate]
    reason: str


_Use = tuple[str, bool, str, tuple[Source, ...]]
"""A candidate of a call in any variant, of those with and without padding apart."""


def _use(w: _Wanted, candidate: Candidate) -> _Use:
    return w.name, w.steps.exact, candidate.name, tuple(launch.source for launch in candidate.launches)


class _Selector:
    def __init__(self, target: Target, emit: Emit, device: torch.device | None, table: Table, measures: bool) -> None:
        self.target, self.emit, self.device, self.table, self.measures = target, emit, device, table, measures
        self.selection = Selection()
        self.emitted: dict[Source, tuple[Kernel, Loaded | None]] = {}
        self.uses: dict[_Use, list[Steps]] = {}
        self.gated: dict[_Use, float] = {}
        self.raced: dict[tuple[str, Steps], dict[str, float]] = {}  # seconds of each candidate that passed
        self.trials = None if device is None else gate.Trials(device)

    def run(self, programs: Iterable[Program], progress: Callable[[int, int], None], done: Callable[[str], None]) -> Selection:
        programs = list(programs)
        wanted = [w for program in programs for w in self.all_wanted(program)]
        for w in wanted:
            for c in w.tried:
                self.uses.setdefault(_use(w, c), []).append(w.steps)
        done("select")
        choices, compiled, layers = self.selection.choices, self._compiled(wanted, done), self._layers(programs)
        total = len(wanted) + len(layers)
        for i, w in enumerate(w for group in compiled for w in group):
            progress(i, total)
            choices[w.name, w.steps] = self._choose(w)
        every = {(w.name, w.steps): w for w in wanted}
        for i, (layer, steps) in enumerate(layers, len(wanted)):
            progress(i, total)
            self._choose_together([every[name, steps] for name in layer])
        checks = (_check(w.graph, w.call, w.steps, choices[w.name, w.steps]) for w in wanted)
        self.selection.checks = [c for c in checks if c is not None]
        progress(total, total)
        done("gate")
        return self.selection

    def all_wanted(self, program: Program) -> Iterator[_Wanted]:
        """Every call in every variant, each once."""
        unique = dict(zip(program.names, program.calls, strict=True))
        for spec in program.specs:
            layer = program.layer if overlap(self.target, spec.steps) else []
            spelled = "\n".join(layer)
            for name, call in unique.items():
                found = candidates(call, spec.steps, self.target)
                among = spelled if name in layer else ""
                yield _Wanted(program.graph, call, name, spec.steps, among, found, *self._tried(call, spec.steps, found, among))

    def _tried(self, call: Call, steps: Steps, found: list[Candidate], layer: str) -> tuple[list[Candidate], str]:
        if len(found) <= 1:
            return found, "only claimant"
        if (hit := self.table.find(call, steps, found, layer)) is not None:
            candidate, entry = hit
            return [candidate], f"fastest of {len(found)} in the tuning table {self.table.name}, {entry.us:g} µs"
        return found if self.measures else found[:1], f"first of {len(found)} by rank"

    def _emit(self, wanted: Iterable[Candidate]) -> Iterator[Source]:
        """As they are compiled."""
        for source, kernel in self.emit([s for s in _sources(wanted) if s not in self.emitted]):
            self.emitted[source] = kernel
            yield source

    def _compiled(self, wanted: list[_Wanted], done: Callable[[str], None]) -> Iterator[list[_Wanted]]:
        """What is wanted, call by call, whose weights are then drawn once: each when its kernels are compiled, or if something will be timed when all are."""
        calls: dict[str, list[_Wanted]] = {}
        for w in sorted(wanted, key=lambda w: w.name):
            calls.setdefault(w.name, []).append(w)
        missing = {name: set(_sources(c for w in group for c in w.tried)) for name, group in calls.items()}
        timed = self.measures and any(len(w.tried) > 1 for w in wanted)

        def ready() -> list[list[_Wanted]]:
            names = [name for name, sources in missing.items() if not sources]
            for name in names:
                del missing[name]
            return [calls[name] for name in names]

        if not timed:
            yield from ready()
        for source in self._emit(c for w in wanted for c in w.tried):
            for sources in missing.values():
                sources.discard(source)
            if not timed:
                yield from ready()
        done("compile kernels")
        yield from ready()

    def _choose(self, w: _Wanted) -> Choice:
        call = w.call
        if not w.found and call.region is not None:
            raise GateError(f"no kernel computes {call.op}, which was grouped for {self.target}; please report this")
        if not w.found:
            return Choice(None, (), f"no kernel family claims ingot.{call.op} for {self.target.isa.partition(':')[0]}; its reference runs")
        if self.device is None:
            return self._taken(w.tried[0], None, w.reason)
        passed = self._passing(w, w.tried)
        if not passed and self.measures and len(w.tried) < len(w.found):  # what the table named is wrong here
            rest = [c for c in w.found if c not in w.tried]
            list(self._emit(rest))
            passed = self._passing(w, rest)
        if not passed:
            raise GateError(f"no kernel for {call} agrees with the reference: {'; '.join(self.selection.rejected[-len(w.found) :])}; please report this")
        best, reason = (passed[0], w.reason) if len(w.tried) == 1 == len(passed) else self._fastest(w, passed)
        return self._taken(best, self.gated[_use(w, best)], reason)

    def _passing(self, w: _Wanted, tried: Sequence[Candidate]) -> list[Candidate]:
        """Those that agree with the reference. A kernel that serves many variants is run in the least and the largest: the others lie between."""
        assert self.trials is not None
        trial: gate.Trial | None = None
        passed = []
        for candidate in tried:
            use = _use(w, candidate)
            steps = self.uses.get(use, [w.steps])
            if use not in self.gated or w.steps in (steps[0], steps[-1]):
                trial = trial or self.trials.of(w.call, w.steps)
                self.gated[use] = max(self.gated.get(use, 0.0), trial.error(candidate, self._loaded(candidate)))
            if self.gated[use] <= gate.tolerance(w.call):
                passed.append(candidate)
            else:
                self.selection.rejected.append(f"{candidate.name} for ingot.{w.call.op}: error {self.gated[use]:.1e}")
        return passed

    def _fastest(self, w: _Wanted, passed: list[Candidate]) -> tuple[Candidate, str]:
        assert self.device is not None
        watch = Stopwatch(w.call, w.steps, self.device)
        seconds = {c.name: watch.seconds(c, self._loaded(c)) for c in passed}
        if watch.warms and min(seconds.values()) > LONG:
            seconds = {c.name: watch.seconds(c, self._loaded(c), WARM) for c in passed if c.name in near(seconds)}
        best = min((c for c in passed if c.name in seconds), key=lambda c: seconds[c.name])
        self.selection.measured.setdefault(_label(w), {n: round(s * 1e6, 2) for n, s in sorted(seconds.items(), key=lambda i: i[1])})
        self.raced[w.name, w.steps] = seconds
        self._tuned(w, best)
        return best, f"fastest of {len(passed)} measured"

    def _tuned(self, w: _Wanted, best: Candidate) -> None:
        us = round(self.raced[w.name, w.steps][best.name] * 1e6, 2)
        for key in fingerprints(w.call, w.steps, w.found, w.layer):
            self.selection.tuned[key] = Tuned(_label(w), best.name, us)

    def _layers(self, programs: Iterable[Program]) -> list[tuple[list[str], Steps]]:
        """The calls of a layer in their order, for all steps in which they overlap. None where nothing is timed."""
        if self.device is None:
            return []
        return [(program.layer, spec.steps) for program in programs for spec in program.specs if overlap(self.target, spec.steps)]

    def _choose_together(self, layer: Sequence[_Wanted]) -> None:
        """Choose once more among what was nearly the fastest alone."""
        of = {w.name: w for w in layer if self.selection.choices[w.name, w.steps].candidate is not None}
        tried = {name: self._nearly_fastest(w) for name, w in of.items()}
        if all(len(found) == 1 for found in tried.values()):
            return
        runs = {name: self._runs(of[name], found) for name, found in tried.items()}
        for name, best in fastest_together([w.name for w in layer if w.name in of], runs).items():
            w, found = of[name], tried[name]
            candidate = next(c for c in found if c.name == best)
            if candidate is not found[0]:
                reason = f"fastest of {len(found)} measured among its layer's others"
                self.selection.choices[name, w.steps] = self._taken(candidate, self.gated[_use(w, candidate)], reason)
                self._tuned(w, candidate)

    def _nearly_fastest(self, w: _Wanted) -> list[Candidate]:
        """The candidates of a call that was timed, the fastest first; else the one that was chosen."""
        if (w.name, w.steps) not in self.raced:
            chosen = self.selection.choices[w.name, w.steps].candidate
            assert chosen is not None
            return [chosen]
        named = {c.name: c for c in w.found}
        return [named[n] for n in near(self.raced[w.name, w.steps])]

    def _runs(self, w: _Wanted, found: Sequence[Candidate]) -> dict[str, Runs]:
        assert self.device is not None
        watch = Stopwatch(w.call, w.steps, self.device, LAYERS)
        return {c.name: watch.runs(c, self._loaded(c)) for c in found}

    def _loaded(self, candidate: Candidate) -> list[Loaded | None]:
        return [None if launch.source.backend == "torch" else self.emitted[launch.source][1] for launch in candidate.launches]

    def _taken(self, candidate: Candidate, error: float | None, reason: str) -> Choice:
        names, selection = [], self.selection
        for launch in candidate.launches:
            if launch.source.backend == "torch":
                names.append(launch.source.symbol)
                continue
            kernel = self.emitted[launch.source][0]
            names.append(kernel.name)
            selection.kernels[kernel.name] = kernel
            if error is not None:
                selection.errors[kernel.name] = max(error, selection.errors.get(kernel.name, 0.0))
        return Choice(candidate, tuple(names), f"{candidate.name}: {reason}")


def _label(w: _Wanted) -> str:
    weight = w.call.args.get("weight")
    shape = "×".join(map(str, weight.shape)) if hasattr(weight, "shape") else ""
    return f"{w.call.op} {shape} T≤{w.steps.max_tokens}"


def _check(graph: Graph, call: Call, steps: Steps, choice: Choice) -> Check | None:
    """What compares a choice with its reference once more, wherever the artifact goes; None when nothing was generated."""
    if choice.candidate is None or all(launch.source.backend == "torch" for launch in choice.candidate.launches):
        return None
    reference, returns = ((), ()) if call.region is None else reference_of(graph, call.region)
    return describe(call, steps, choice.candidate, choice.kernels, reference, returns)
