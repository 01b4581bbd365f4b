"""The claim on regions: what is grouped into one, and the kernels that compute it."""

from __future__ import annotations

import torch

from ingot.ops.dims import contiguous_strides
from ingot.ops.graph import Region
from ingot.ops.kernel import Call, Candidate, Steps
from ingot.ops.target import Target

from . import region_triton, region_tvm
from .region_program import UnclaimedError, parse

_ANY = Steps(max_tokens=1, max_seqs=1, max_num_new=1, max_rows=1, exact=False)


def candidates(region: Region, call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """Kernels for a region called with `call`'s arguments (by the names of its placeholders) and results; [] when it is not claimed."""
    try:
        program, wide = parse(region, call), apart(region)
        return region_triton.candidates(program, call, steps, wide) if target.kind == "cuda" else region_tvm.candidates(program, call, steps, target, wide)
    except UnclaimedError:
        return []


def apart(region: Region) -> set[str]:
    """The arguments that are views whose rows lie apart: some columns of something wider."""
    return {n.name for n in region.module.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor) and _rows_apart(n.meta["val"])}


def _rows_apart(fake: torch.Tensor) -> bool:
    inner = fake.shape[1:]
    if fake.dim() < 2 or isinstance(fake.shape[0], int) or not all(isinstance(n, int) for n in (*inner, *fake.stride())) or fake.is_contiguous():
        return False
    return fake.stride()[1:] == contiguous_strides(inner)


def claimed(region: Region, call: Call, target: Target) -> bool:
    """Whether `candidates` finds any, for whatever steps."""
    return bool(candidates(region, call, _ANY, target))
