"""The dialect: what a Graph may say. Importing this package registers every op and loads no kernel generator."""

from . import attention, embedding, glu, linear, moe, norm, rotary, state_space
from .dialect import OPS, Op
from .graph import Graph, GraphError, InputSpec, Recipe, StateSpec, Weight

__all__ = ["OPS", "Graph", "GraphError", "InputSpec", "Op", "Recipe", "StateSpec", "Weight",
           "attention", "embedding", "glu", "linear", "moe", "norm", "rotary", "state_space"]  # fmt: skip
