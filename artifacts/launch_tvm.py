"""CPU kernels: shared objects that need tvm-ffi to be called and libgomp, which torch has loaded, for their parallel loops.

A kernel divides its work between `torch.get_num_threads()` threads of the calling thread's OpenMP pool, the one that
torch's own operators use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tvm_ffi

from .files import ArtifactError
from .plan import Kernel


class SharedObject:
    """One function of a shared object."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def bind(self, args: Sequence[Any], grid: tuple[int, ...] = ()) -> Callable[[], None]:
        """A function that runs the kernel on `args` (tensors, ints, floats) without copying them; it keeps the tensors alive.

        A tensor whose dtype, shape or alignment is not what the kernel was compiled for raises TypeError or ValueError at the call.
        """
        return partial(self.function, *(tvm_ffi.from_dlpack(a) if isinstance(a, torch.Tensor) else a for a in args))


def load(kernel: Kernel, path: Path) -> SharedObject:
    """Load `kernel`'s file. ArtifactError if it is not a shared object that this machine can load, or holds another kernel."""
    try:
        return SharedObject(tvm_ffi.load_module(str(path))[kernel.symbol])
    except (RuntimeError, AttributeError) as error:
        raise ArtifactError(f"{path} cannot be loaded ({str(error).splitlines()[0]}); compile the model on this machine") from error
