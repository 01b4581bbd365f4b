"""Asking for memory ahead: what does not depend on the predecessor can be on its way to L2 while that one ends."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch_rows(row, ROWS: tl.constexpr, BYTES: tl.constexpr, THREADS: tl.constexpr):
    """Ask for the first BYTES at each of ROWS pointers; a thread asks for a piece, and nobody waits. sm_90 on.

    The pointers are multiples of 16 if BYTES is one: the hardware takes no others, so nothing is asked for if it is not.
    """
    PIECES: tl.constexpr = max(min(THREADS // ROWS, (BYTES & -BYTES) // 64), 1)
    PIECE: tl.constexpr = BYTES // PIECES // 16 * 16
    if PIECE > 0 and BYTES % 16 == 0:
        at = row.to(tl.int64)[:, None] + tl.arange(0, PIECES)[None, :] * PIECE
        size = tl.full([ROWS, PIECES], PIECE, tl.int32)
        tl.inline_asm_elementwise("cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r", [at, size], tl.int32, is_pure=False, pack=1)
