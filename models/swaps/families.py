"""Classes that have an adapter in `models/families`."""

from __future__ import annotations

import torch

from ..families import ADAPTERS, alibi, experts, recurrent, sparse, written_out  # noqa: F401  (the files register what they adapt)
from . import Patch, Swap
from .context import Context


class Families(Swap):
    """The methods named there, on the classes of the model that have them."""

    def __init__(self, model: torch.nn.Module, context: Context) -> None:
        classes = {type(m) for m in model.modules() if type(m).__module__.startswith("transformers.models.")}
        self.classes = {f"{cls.__module__.split('.')[2]}.{cls.__name__}": cls for cls in classes}

    def observers(self) -> list[Patch]:
        return self.patches()

    def patches(self) -> list[Patch]:
        return [Patch(self.classes[name], method, adapter) for (name, method), adapter in ADAPTERS.items() if name in self.classes]
