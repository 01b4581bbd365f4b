"""What a process that will run an engine does first."""

from __future__ import annotations

import threading

from ingot.ops.cuda import make_context

from .process import Stages


def prepare(stages: Stages) -> None:
    """Make the GPU's context in a thread, which takes long and needs nothing imported, and import torch meanwhile."""
    threading.Thread(target=make_context, daemon=True).start()
    stages.enter("import torch")
    import torch  # noqa: F401

    stages.enter("import Ingot")
