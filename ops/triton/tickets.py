"""The last of several programs finishes what all of them have begun, without another launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(ticket, count):
    """Whether this program is the last of `count` to draw `ticket`, which is zero again then; who is sees what the others had stored.

    It must read that past its own L1 cache (".cg"). The last program is another each time, so it must reduce in an order of its own.
    """
    tl.debug_barrier()  # all threads have stored
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(ticket, 0)
    return last
