"""The last of several programs finishes what all of them have begun, without another launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(ticket, COUNT: tl.constexpr):
    """Whether this program is the last of COUNT to draw `ticket`, which is zero again then; who is sees what the others had stored.

    It must read that past its own L1 cache (".cg"). The last program is another each time, so it must reduce in an order of its own.
    """
    tl.debug_barrier()  # all threads have stored
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == COUNT - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def is_last_of(ticket, count):
    """`is_last` of a number of programs that is known when they run."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(ticket, 0)
    return last
