"""Progress on stderr: a bar on a terminal, a line a stage elsewhere. Standard output is for results, and for where the seconds went."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class StageBar:
    """What a long task is doing: `update(stage, fraction)` as often as it likes."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._stage = ""
        self._start = time.perf_counter()
        self._bar = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(title, total=1.0)

    def update(self, stage: str, fraction: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._title}: {stage}", completed=fraction)
        elif stage != self._stage:
            print(f"{self._title}: {stage} ({time.perf_counter() - self._start:.1f} s)", file=sys.stderr, flush=True)
        self._stage = stage

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def print_seconds(stages: Mapping[str, float], notes: Mapping[str, str] | None = None) -> None:
    """A table of the seconds that each stage took and their share; `notes` say more of some. What rounds to nothing is left out."""
    total = sum(stages.values())
    table = Table("stage", "seconds", "share", "", box=None, pad_edge=False)
    for stage, seconds in stages.items():
        if seconds >= 0.005:
            table.add_row(stage, f"{seconds:.2f}", f"{seconds / total:.0%}", (notes or {}).get(stage, ""))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
