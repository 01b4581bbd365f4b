"""Where the engine's process starts."""

from __future__ import annotations

import sys

from ingot.ops.garbage import uncollected

from .prepare import prepare
from .process import Stages


def main() -> int:
    """`engine_main SOCKET,… CONFIG`; the exit code."""
    stages = Stages("python")
    with uncollected():
        prepare(stages)
        from .engine_process import run

    return run([int(fd) for fd in sys.argv[1].split(",")], sys.argv[2], stages)


if __name__ == "__main__":
    sys.exit(main())
