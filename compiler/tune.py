"""`ingot tune`: measure every candidate of every call of some models, and write which were fastest as the device's tuning table."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ingot.artifacts.settings import settings
from ingot.artifacts.store import Store
from ingot.ops.target import resolve

from .build import CompileOptions, Job, Progress, device_for
from .codegen.emit import Emitter
from .select import select
from .tuning import SHIPPED, Table, Tuned, TuningError, entries_of, slug, write
from .warm_up import warm_up


@dataclass(frozen=True)
class TuneReport:
    """The table's file, how many entries it has, and what the numeric gate rejected."""

    path: Path
    entries: int
    rejected: list[str]


def tune(
    models: Sequence[str], options: CompileOptions, output: Path | None, progress: Progress = lambda stage, done: None, *, add: bool = False
) -> TuneReport:
    """Measure on this machine's device and write the table, to `output` or where this installation's compiler reads it.

    With `add` what the file has already stays and is not measured again. Without, the file has what was measured now and nothing older. What several models
    have in common is measured once.
    Weights are made up, so that a model's folder needs no more than its config.json. Raises TuningError without the device.
    """
    target = resolve(options.target)
    device = device_for(target)
    if device is None or not target.device:
        raise TuningError(f"{target} is not here to measure on: run `ingot tune` on a machine that has it")
    path = output or SHIPPED / f"{slug(target.device)}.json"
    entries: dict[str, Tuned] = dict(entries_of(path, target)) if add and path.is_file() else {}
    rejected: list[str] = []
    for model in models:
        job = Job.prepare(model, replace(options, dummy_weights=True, tune=True))
        warm_up(target)
        graph, _ = job.lowered(lambda stage, done, model=model: progress(f"{model}: {stage}", done), lambda stage: None)  # type: ignore[misc]
        compiled = _stage(progress, f"{model}: compile kernels")
        with tempfile.TemporaryDirectory(prefix="ingot-kernels-") as folder, Emitter(target, Store(settings().home), Path(folder), compiled) as emitter:
            stage = _stage(progress, f"{model}: measure")
            selection = select([p for _, p in job.programs(graph)], target, emitter, device, stage, Table(path.name, "", entries, strict=True), measure=True)
        entries = selection.tuned | entries  # what was measured before stays: another layer's choice is as good without its layer
        rejected += selection.rejected
    write(path, target, entries)
    return TuneReport(path, len(entries), rejected)


def _stage(progress: Progress, name: str):
    return lambda done, of: progress(name, done / max(of, 1))
