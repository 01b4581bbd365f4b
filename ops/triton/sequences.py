"""What kernels that carry a recurrent state have in common: a program takes a part of one sequence's state, and that sequence's tokens in order."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from ..dims import Dim, plus
from ..kernel import Call, Operand, Steps
from .source import FLOATS, supported

INDICES = ("cu_seqlens_q", "seq_lens", "state_slots")


@triton.jit
def sequence(seq, cu_seqlens_q, seq_lens, state_slots, num_tokens, num_seqs, DECODE: tl.constexpr):
    """A sequence's first token, the one after its last, its slot (−1: padding), and whether it starts now. The tokens after the last are one of padding.

    DECODE: there is a token of each, and none after them.
    """
    if DECODE:
        begin = seq
        end = seq + 1
        slot = tl.load(state_slots + seq)
        length = tl.load(seq_lens + seq)
    else:
        inside = seq < num_seqs
        begin = tl.load(cu_seqlens_q + seq)
        end = tl.load(cu_seqlens_q + seq + 1, mask=inside, other=num_tokens)
        slot = tl.load(state_slots + seq, mask=inside, other=-1)
        length = tl.load(seq_lens + seq, mask=inside, other=0)
    return begin, end, tl.where(length > 0, slot, -1).to(tl.int64), length == end - begin


@triton.jit
def aligned(pitch, pointer, WIDTH: tl.constexpr):
    """How far rows of WIDTH elements are apart. Where they are pieces of 16 bytes, so is that, and the compiler should know."""
    PIECE: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
    if WIDTH % PIECE == 0:
        pitch = pitch // PIECE * PIECE
    return pitch


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + 2 artanh(s), s = u / (2 + u), u = e^−|x|: accurate also where it is small."""
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    z = s * s
    series = 1.0 + z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9 + z * (1.0 / 11 + z * (1.0 / 13 + z / 15))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


def recurrent(call: Call, state: str | None = None) -> bool:
    """Whether every floating argument has a type that kernels read, and `state`, if there is one named, is kept in float32."""
    floats = {a.dtype for a in call.args.values() if hasattr(a, "dtype") and a.dtype.is_floating_point}
    return supported(call) and floats <= set(FLOATS) and (state is None or call.args[state].dtype == torch.float32)


def decodes(steps: Steps) -> bool:
    """Whether every step has one token of each sequence, and no others."""
    return steps.exact and steps.max_num_new == 1


def sequences(call: Call, steps: Steps) -> tuple[Dim, int]:
    """The grid's axis over sequences, that of the tokens after the last one included."""
    (seqs,) = call.args["state_slots"].shape
    return (seqs if decodes(steps) else plus(seqs, 1)), 1


def operands(call: Call, names: Iterable[str], apart: Iterable[str]) -> dict[str, Operand]:
    """`names` and the step's, the result as `y`, the numbers of tokens and sequences, and the pitch of each argument in `apart` that the call has."""
    tokens, (seqs,) = call.results[0].shape[0], call.args["state_slots"].shape
    wide = [n for n in apart if call.args[n] is not None]
    return {
        **{n: Operand(arg=n, rows=n in wide) for n in (*names, *INDICES)},
        "y": Operand(out=0), "num_tokens": Operand(size=tokens), "num_seqs": Operand(size=seqs),
        **{f"{n}_pitch": Operand(pitch=n) for n in wide},
    }  # fmt: skip
