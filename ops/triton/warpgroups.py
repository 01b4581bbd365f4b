"""How a warpgroup that copies and those that compute wait for each other, by barriers in shared memory (Hopper)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper


@gluon.jit
def arrived(full, turn):
    """Wait until a block is in shared memory, where the matrix units see it."""
    hopper.mbarrier.wait(full, turn)
    hopper.fence_async_shared()


@gluon.jit
def let_go(free):
    """All threads of this warpgroup have read the block."""
    gl.thread_barrier()
    hopper.mbarrier.arrive(free, count=1)
