"""`ingot bench startup`: from the start of a process to its first token, each time a new process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ingot.ops.errors import IngotError


class StartFailed(IngotError):
    """The process that was to be timed did not succeed."""


def run(path: Path, repeats: int, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Medians in seconds: `ready` when requests are taken, `first_token`, and the whole `process`. The first run may read a cold disk: it is given apart."""
    runs = []
    for i in range(repeats + 1):
        progress(f"start {i + 1} of {repeats + 1}", i / (repeats + 1))
        runs.append(_start(path))
    medians = {name: statistics.median(r[name] for r in runs[1:]) for name in runs[0]}
    return {"artifact": str(path), "seconds": medians, "first_run_seconds": runs[0]}


def _start(path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "ingot.serve.cli", "generate", str(path), "--prompt-ids", "1,2,3", "--max-tokens", "1", "--ignore-eos", "--json"]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise StartFailed(f"{' '.join(command[2:])} failed: {done.stderr.strip()}")
    timing = json.loads(done.stdout)["timing"]
    return {"ready": timing["ready"], "first_token": timing["ready"] + timing["first_token"], "process": seconds}
