"""The claim on regions: what is grouped into one, and the kernels that compute it."""

from __future__ import annotations

from ingot.ops.graph import Region
from ingot.ops.kernel import Call, Candidate, Steps
from ingot.ops.target import Target

from . import region_triton, region_tvm
from .region_program import UnclaimedError, parse

_ANY = Steps(max_tokens=1, max_seqs=1, max_num_new=1, max_rows=1, exact=False)


def candidates(region: Region, call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """Kernels for a region called with `call`'s arguments (by the names of its placeholders) and results; [] when it is not claimed."""
    try:
        program = parse(region, call)
        return region_triton.candidates(program, call, steps) if target.kind == "cuda" else region_tvm.candidates(program, call, steps, target)
    except UnclaimedError:
        return []


def claimed(region: Region, call: Call, target: Target) -> bool:
    """Whether `candidates` finds any, for whatever steps."""
    return bool(candidates(region, call, _ANY, target))
