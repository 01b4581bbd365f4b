"""What a compilation will wait for, and can begin before anything is imported. No torch."""

from __future__ import annotations

import threading

from ingot.artifacts.settings import settings
from ingot.ops.cuda import make_context
from ingot.ops.target import Target

from .codegen import triton, tvm


def warm_up(target: Target) -> None:
    """Have the compilers of a target's kernels imported, in processes of their own, and the context of its GPU made if that is here."""
    if target.kind == "cpu":
        tvm.warm_up(min(2, settings().num_threads))
        return
    triton.warm_up()
    if target.device:
        threading.Thread(target=make_context, daemon=True).start()
