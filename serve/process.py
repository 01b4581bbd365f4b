"""How old this process is, and what it has done since."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def age() -> float:
    """Seconds since the process was started, imports and all, to a hundredth."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5): ticks after boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Stages:
    """The seconds that a starting process spent on one thing after another, by name; they add up to its age at the last `enter`."""

    def __init__(self, first: str) -> None:
        self.seconds: dict[str, float] = {}
        self._stage = first
        self._since = 0.0

    def enter(self, stage: str) -> None:
        """The stage before it is over. One that comes again is added to."""
        if stage != self._stage:
            now = age()
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
            self._stage, self._since = stage, now

    def watching(self, progress: Callable[[str, float], None]) -> Callable[[str, float], None]:
        """`progress`, and the stages that begin become this process's."""

        def update(stage: str, fraction: float) -> None:
            if fraction < 1.0:
                self.enter(stage)
            progress(stage, fraction)

        return update
