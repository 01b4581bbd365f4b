"""Where the engine's process starts: what takes long and needs nothing imported is begun, while the rest is imported."""

from __future__ import annotations

import sys
import threading

from ingot.ops.cuda import make_context

from .process import Stages


def main() -> int:
    """`engine_main SOCKET,… CONFIG`; the exit code."""
    stages = Stages("python")
    threading.Thread(target=make_context, daemon=True).start()
    stages.enter("import torch")
    from ingot.runtime.import_torch import import_torch

    import_torch()
    stages.enter("import Ingot")
    from .engine_process import run

    return run([int(fd) for fd in sys.argv[1].split(",")], sys.argv[2], stages)


if __name__ == "__main__":
    sys.exit(main())
