"""The dialect: what a Graph may say. Taking a name from this package registers every op and loads no kernel generator.

The names come when they are first asked for, because they bring torch: the command line and the server, which need
`errors` and `target` alone, start without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import attention, embedding, glu, latent_attention, linear, linear_attention, moe, norm, pooling, quantized, rotary, sampling, state_space
    from .dialect import OPS, Op
    from .graph import Graph, GraphError, InputSpec, Recipe, StateSpec, Weight

__all__ = ["OPS", "Graph", "GraphError", "InputSpec", "Op", "Recipe", "StateSpec", "Weight",
           "attention", "embedding", "glu", "latent_attention", "linear", "linear_attention", "moe", "norm", "pooling",
           "quantized", "rotary", "sampling", "state_space"]  # fmt: skip

_FAMILIES = tuple(name for name in __all__ if name.islower())


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for family in _FAMILIES:
        importlib.import_module(f".{family}", __name__)
    graph, dialect = importlib.import_module(".graph", __name__), importlib.import_module(".dialect", __name__)
    globals().update({n: getattr(graph, n) for n in ("Graph", "GraphError", "InputSpec", "Recipe", "StateSpec", "Weight")})
    globals().update(OPS=dialect.OPS, Op=dialect.Op)
    return globals()[name]
