"""How old this process is."""

from __future__ import annotations

import os
import time
from pathlib import Path


def age() -> float:
    """Seconds since the process was started, imports and all, to a hundredth."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5): ticks after boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
