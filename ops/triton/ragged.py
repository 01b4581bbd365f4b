"""Tiles and tokens of a ragged batch: a sequence's tokens are in tiles of its own, numbered over the batch; a program finds its sequence in `cu_seqlens_q`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..dims import Dim, plus, product


@triton.jit
def tile_of(tile, cu_seqlens_q, num_seqs, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr):
    """The sequence of a tile of BLOCK rows, its first token, and the tile's first row in it; a token has ROWS rows.

    BLOCK_S is more than the most sequences. The tokens after the last sequence are one more, and a tile may have no row of its sequence.
    """
    s = tl.arange(0, BLOCK_S)
    tiles_before = tl.load(cu_seqlens_q + s, mask=s <= num_seqs, other=0) * ROWS // BLOCK + s
    seq = tl.sum(((s <= num_seqs) & (tiles_before <= tile)).to(tl.int32)) - 1
    start = tl.load(cu_seqlens_q + seq)
    return seq, start, (tile - start * ROWS // BLOCK - seq) * BLOCK


@triton.jit
def tile_of_rank(rank, cu_seqlens_q, seq_lens, num_seqs, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr):
    """The tile that is `rank`th to begin: the batch's last one first, which has the most keys before it, then on to the first; after them those of sequences
    that padding added. A token has one row."""
    s = tl.arange(0, BLOCK_S)
    some = tl.sum((tl.load(seq_lens + s, mask=s < num_seqs, other=0) > 0).to(tl.int32))
    count = tl.load(cu_seqlens_q + some) // BLOCK + some
    return tl.where(rank < count, count - 1 - rank, rank)


@triton.jit
def place_of(token, cu_seqlens_q, seq_lens, num_tokens, num_seqs, BLOCK_S: tl.constexpr, EXACT: tl.constexpr):
    """The sequence and the position of a token; −1 of one that no sequence has."""
    if EXACT:
        seq = token
        position = tl.load(seq_lens + token) - 1
    else:
        s = tl.arange(0, BLOCK_S)
        seq = tl.sum((tl.load(cu_seqlens_q + s, mask=s <= num_seqs, other=1 << 30) <= token).to(tl.int32)) - 1
        length = tl.load(seq_lens + seq, mask=seq < num_seqs, other=0)
        end = tl.load(cu_seqlens_q + seq + 1, mask=seq < num_seqs, other=num_tokens)
        position = tl.where(length > 0, length - end + token, -1)
    return seq, position


def tiles_of(tokens: Dim, seqs: Dim, block: int, rows: int = 1) -> tuple[Dim, int]:
    """The grid's axis over tiles of `block` rows."""
    return plus(product(tokens, rows), seqs, block), block
