"""Candidates of a call that is two others in a row: what the first one makes goes through scratch to the second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .kernel import Candidate, Operand, Tensor


def chain(head: Candidate, middle: Tensor, link: str, tail: Candidate, renamed: Mapping[str, str] | None = None) -> Candidate:
    """`head`, whose result 0 is `middle`, then `tail`, which reads it as its argument `link`. Other results of `head` are the whole call's.

    `renamed`: arguments of `head` that the whole call knows by another name.
    """
    names = renamed or {}
    behind = 1 + len(head.scratch)

    def of_head(o: Operand) -> Operand:
        if o.out == 0:
            return Operand(scratch=0, view=o.view)
        if o.scratch is not None:
            return replace(o, scratch=o.scratch + 1)
        return replace(o, arg=names.get(o.arg, o.arg)) if o.arg is not None else o

    def of_tail(o: Operand) -> Operand:
        if o.arg == link:
            return Operand(scratch=0, view=o.view)
        return o if o.scratch is None else replace(o, scratch=o.scratch + behind)

    launches = [replace(x, operands=tuple(map(of_head, x.operands))) for x in head.launches]
    launches += [replace(x, operands=tuple(map(of_tail, x.operands))) for x in tail.launches]
    return Candidate(f"{head.name}+{tail.name}", tuple(launches), (middle, *head.scratch, *tail.scratch), tail.rank, tail.inplace)
