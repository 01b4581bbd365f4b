"""A Graph from a plain function of tensors: what the tests of passes and `torch.compile(backend="ingot")` start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ingot.models.alike import UNREAD
from ingot.models.swaps import patched
from ingot.ops import Graph, InputSpec, Recipe, StateSpec, Weight

_EXAMPLE = {"T": 7, "S": 3, "R": 5}


@patched(UNREAD)
def from_function(
    fn: Callable[..., Any],
    inputs: Mapping[str, InputSpec],
    states: Mapping[str, StateSpec] | None = None,
    weights: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] | None = None,
) -> Graph:
    """Trace `fn`, called with every input, state and weight by name; it returns (results, new states), both lists, or results alone.

    Inputs' symbolic sizes keep their names. A weight becomes `Recipe("tensor", (its name,))`.
    """
    states, weights = states or {}, weights or {}
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = dict(_EXAMPLE)

    def fake(shape: tuple[str | int, ...], dtype: torch.dtype, source: str) -> torch.Tensor:
        for n in shape:
            if isinstance(n, str):
                sizes.setdefault(n, 11 + 2 * len(sizes))
        example = torch.zeros([sizes[n] if isinstance(n, str) else n for n in shape], dtype=dtype)
        dynamic = [DimDynamic.DYNAMIC if isinstance(n, str) else DimDynamic.STATIC for n in shape]
        return mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic), source=ConstantSource(source))

    values: dict[str, torch.Tensor] = {}
    spelled: dict[str, tuple[str | int, ...]] = {n: i.shape for n, i in inputs.items()}
    spelled |= {n: (f"N_{s.group}", *s.shape) for n, s in states.items()} | {n: shape for n, (_, shape) in weights.items()}
    dtypes = {n: i.dtype for n, i in inputs.items()} | {n: s.dtype for n, s in states.items()} | {n: d for n, (d, _) in weights.items()}
    for name, shape in spelled.items():
        values[name] = fake(shape, dtypes[name], name)
    symbols: dict[str, str] = {}
    first: dict[str, Any] = {}
    for name, shape in spelled.items():
        for n, size in zip(shape, values[name].shape, strict=True):
            if isinstance(n, str):
                first.setdefault(n, size)
                torch._check(size == first[n])
                symbols[str(size.node.expr)] = n
    order = list(values)

    def flat(*args: torch.Tensor) -> list[torch.Tensor]:
        result = fn(**dict(zip(order, args, strict=True)))
        results, new_states = result if states else (result, [])
        return [*results, *new_states]

    with mode:
        module = make_fx(flat, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=False)(*values.values())
    for node, name in zip([n for n in module.graph.nodes if n.op == "placeholder"], order, strict=True):
        node.name = node.target = name
    outputs = module.graph.output_node().args[0]
    graph = Graph(
        fx=module.graph,
        inputs=dict(inputs),
        states=dict(states),
        weights={n: Weight(Recipe("tensor", (n,)), d, shape) for n, (d, shape) in weights.items()},
        symbols=symbols,
        num_results=len(outputs) - len(states),
    )
    graph.fx.eliminate_dead_code()
    graph.verify()
    return graph
