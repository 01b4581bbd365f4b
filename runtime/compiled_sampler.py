"""An artifact's own sampler: the plans of its entry point `sample`, one for each type of logits."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch

from ingot.artifacts.bound import Loaded
from ingot.artifacts.plan import Variant

from .batch import Field, StepBatch, StepSize
from .bind import BoundPlan, bind, tickets

_BOUND = 128
"""Plans that stay bound; logits of a step size seen before cost no binding."""


class CompiledSampler:
    """Calls the plans of `variants`. Their scratch memory is theirs alone, since logits lie in the arena of `forward`."""

    def __init__(self, variants: Iterable[Variant], kernels: Mapping[str, Loaded], device: torch.device) -> None:
        self._by_dtype = {next(v.dtype for v in variant.values if v.name == "logits"): variant for variant in variants}
        self._kernels, self._device = kernels, device
        self._arena = torch.empty(max(v.arena_bytes for v in self._by_dtype.values()), dtype=torch.uint8, device=device)
        self._tickets = tickets(list(self._by_dtype.values()), device)
        self._bound: OrderedDict[tuple[int, torch.dtype, StepSize], BoundPlan] = OrderedDict()

    def __call__(self, logits: torch.Tensor, batch: StepBatch, buffer: torch.Tensor) -> torch.Tensor:
        """The token of each row of `logits` [R, V], R as padded → [R] int32, overwritten by the next call; `buffer` as for `Sampler`."""
        key = (logits.data_ptr(), logits.dtype, batch.padded._replace(longest=0))
        plan = self._bound.get(key)
        if plan is None:
            plan = self._bound[key] = self.bind(logits, batch.fields, buffer)
            if len(self._bound) > _BOUND:
                self._bound.popitem(last=False)
        self._bound.move_to_end(key)
        plan.run()
        return plan.results[0]

    def bind(self, logits: torch.Tensor, fields: Mapping[str, Field], buffer: torch.Tensor) -> BoundPlan:
        """What chooses the token of each row of `logits` [R, V], always from there, as the `fields` of `buffer` say."""
        variant = self._by_dtype[str(logits.dtype).removeprefix("torch.")]
        places = {v.name: fields[v.name] for v in variant.values if v.storage == "input" and v.name != "logits"}
        roots = {n: buffer[f.offset : f.offset + math.prod(f.shape)].view(getattr(torch, f.dtype)) for n, f in places.items()}
        return bind(variant, {"R": logits.shape[0]}, roots | self._tickets | {"logits": logits}, self._arena, self._kernels, self._device)
