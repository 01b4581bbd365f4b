"""A compiled kernel, loaded: bind it to arguments once, run it many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from .plan import Kernel


class Loaded(Protocol):
    """A kernel that this machine can run."""

    def bind(self, args: Sequence[Any], grid: tuple[int, ...]) -> Callable[[], None]:
        """A function that runs the kernel on `args` (tensors, ints, floats); on a GPU it launches on torch's current stream."""
        ...


def load(kernel: Kernel, path: Path) -> Loaded:
    """Load a kernel's file; what it needs to run (tvm-ffi, the CUDA driver) is imported here."""
    if kernel.backend == "triton":
        from .launch_cuda import load as load_cubin

        return load_cubin(kernel, path)
    from .launch_tvm import load as load_shared_object

    return load_shared_object(kernel, path)
