"""The loop that recurrent kernels share: parts of a state, each of which walks the tokens of its sequence in order."""

from __future__ import annotations

from collections.abc import Collection
from textwrap import dedent, indent

import torch

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor
from .vector import DTYPES, Buffer, Vectors, row_element


def recurrent(call: Call, state: str | None = None) -> bool:
    """Whether every floating argument has a type that kernels read, and `state`, if there is one named, is kept in float32."""
    tensors = [a for a in call.args.values() if isinstance(a, Tensor)]
    return all(t.dtype in DTYPES or t.dtype == torch.int32 for t in tensors) and (state is None or call.args[state].dtype == torch.float32)


def walk(steps: Steps, call: Call, units: int, cost: int, *, local: str = "", first: str = "", start: str = "", token: str, finish: str = "", zero: str) -> str:
    """Lines that compute part `unit`, of `units`, of every sequence: `start` with its state in `slot`, `token` for each `t`, `finish`.

    `first` comes before `start` where a sequence begins, `zero` is what padding tokens get; `local` declares what all of them use. The
    tokens after the last sequence are one more, of padding. `cost`: of a token and unit, an element's copy being 1.
    """
    tokens = steps.bound(call.results[0].shape[0])
    loop = "T.parallel" if tokens * units * cost >= 1 << 15 else "T.serial"

    def part(lines: str, depth: int) -> str:
        return indent(dedent(lines).strip("\n") or "pass", "    " * depth)

    beginning = f"            if seq_lens[s] == end - begin:\n{part(first, 4)}" if first else ""
    # Sequences inside: an even share of the units is an even share of the work.
    return f"""
for task in {loop}({units} * (seqs + 1)):
    s: T.let = task % (seqs + 1)
    unit: T.let = task // (seqs + 1)
    begin: T.let = cu_seqlens_q[s]
    end: T.let = T.if_then_else(s < seqs, cu_seqlens_q[T.min(s + 1, seqs)], tokens)
    last: T.let = T.min(s, seqs - 1)
    slot: T.let = T.cast(T.if_then_else(s < seqs, T.if_then_else(seq_lens[last] > 0, state_slots[last], -1), -1), "int64")
{part(local, 1)}
    if slot >= 0:
        if begin < end:
{beginning}
{part(start, 3)}
            for n in T.serial(end - begin):
                t: T.let = begin + n
{part(token, 4)}
{part(finish, 3)}
    else:
        for n in T.serial(end - begin):
            t: T.let = begin + n
{part(zero, 3)}
"""


def candidate(v: Vectors, call: Call, state: str, body: str, apart: Collection[str]) -> Candidate:
    """The kernel of a `body` over the call's tensors under their names, and its result as `y`. `apart`: arguments whose rows may lie apart, read by `row`."""
    tensors = {n: a for n, a in call.args.items() if isinstance(a, Tensor)}
    buffers: list[Buffer] = [(_NAMES.get(n, n), _dtype(t), _shape(n, t, state)) for n, t in tensors.items()]
    result = call.results[0]
    buffers.append(("y", _dtype(result), ("tokens", *result.shape[1:])))  # type: ignore[arg-type]
    operands = [Operand(arg=n, rows=n in apart) for n in tensors]
    text = v.script(call.op, buffers, body, apart={_NAMES.get(n, n) for n in apart if n in tensors})
    return Candidate("walk", (Launch(Source(call.op, "tvm", call.op, text), (*operands, Operand(out=0))),))


def row(call: Call, name: str, *indices: str) -> str:
    """An element of an argument whose rows may lie apart."""
    return row_element(_NAMES.get(name, name), call.args[name], indices)


_NAMES = {"k": "keys"}  # k is what loops over vectors count


def _dtype(tensor: Tensor) -> str:
    return "int32" if tensor.dtype == torch.int32 else DTYPES[tensor.dtype]


def _shape(name: str, tensor: Tensor, state: str) -> tuple[int | str, ...]:
    named = {"cu_seqlens_q": "starts", "seq_lens": "seqs", "state_slots": "seqs", state: "slots"}
    first, *rest = tensor.shape
    return (named.get(name, "tokens") if isinstance(first, dict) else first, *rest)  # type: ignore[return-value]


def divisor(size: int, most: int) -> int:
    """The largest number up to `most` that divides a size."""
    return max(d for d in range(1, most + 1) if size % d == 0)
