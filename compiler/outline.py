"""What all plans of a graph share: values, views among them, and the calls that are left when views are gone.

Evaluating a graph on fake tensors is most of planning, and does not depend on which kernels are chosen: it is done once.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ingot.artifacts.plan import Value
from ingot.ops import Graph
from ingot.ops.dims import Dim
from ingot.ops.graph import op_of, states_of
from ingot.ops.kernel import Call

from .call import call_of, dtype_name


@dataclass(frozen=True)
class Step:
    """A node that computes: as kernel families see it (None: an aten op), and the values of its results, states left out."""

    node: fx.Node
    call: Call | None
    outputs: tuple[str, ...]


@dataclass
class Outline:
    """`holds`: the value that a node stands for, or a list of them; `values` by name."""

    graph: Graph
    values: dict[str, Value] = field(default_factory=dict)
    holds: dict[fx.Node, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    fakes: dict[fx.Node, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph) -> Outline:
        outline = cls(graph)
        for node in graph.fx.nodes:
            if node.op == "placeholder":
                outline._placeholder(node)
            elif node.op == "call_function":
                outline._call(node)
        return outline

    @property
    def calls(self) -> list[Call]:
        """What kernel families may claim, as often as it is called."""
        return [s.call for s in self.steps if s.call is not None]

    @property
    def results(self) -> tuple[str, ...]:
        """The values that the entry point returns."""
        return tuple(self.holds[n] for n in self.graph.fx.output_node().args[0][: self.graph.num_results])

    def _placeholder(self, node: fx.Node) -> None:
        fake = node.meta["val"]
        storage = "input" if node.name in self.graph.inputs else "state" if node.name in self.graph.states else "weight"
        self.values[node.name] = Value(node.name, dtype_name(fake.dtype), self.graph.shape(node), storage)  # type: ignore[arg-type]
        self.holds[node], self.fakes[node] = node.name, fake

    def _fresh(self, name: str, dtype: torch.dtype, shape: tuple[Dim, ...]) -> str:
        self.values[name] = Value(name, dtype_name(dtype), shape, "arena")
        return name

    def _view(self, name: str, fake: torch.Tensor, of: str) -> str:
        source = self.values[of]
        self.values[name] = Value(
            name,
            dtype_name(fake.dtype),
            tuple(self.graph.dim(s) for s in fake.shape),
            source.storage,
            root=source.root or source.name,
            strides=None if fake.is_contiguous() else tuple(self.graph.dim(s) for s in fake.stride()),
            offset=self.graph.dim(fake.storage_offset()),
        )
        return name

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            self.holds[node] = self.holds[node.args[0]][node.args[1]]
            self.fakes[node] = self.fakes[node.args[0]][node.args[1]]
            return
        if not isinstance(node.meta["val"], (torch.Tensor, tuple, list)):
            return  # a size: its users read it from the fake value
        fake = node.meta["val"]
        if op_of(node) is None:  # the dialect's own results are never views
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.fakes[n] if n in self.fakes else n.meta["val"])
            with self.graph.fake_mode:
                fake = node.target(*args, **kwargs)
            if self._alias(node, fake):
                return
        self.steps.append(Step(node, call_of(self.graph, node), tuple(self._outputs(node, fake))))

    def _alias(self, node: fx.Node, fake: Any) -> bool:
        """Whether every result shares the storage of an argument: then a view is all it takes."""
        results = fake if isinstance(fake, (tuple, list)) else [fake]
        sources = [n for n in node.all_input_nodes if n in self.fakes and isinstance(self.fakes[n], torch.Tensor)]
        names = []
        for i, result in enumerate(results):
            source = next((n for n in sources if torch._C._is_alias_of(result, self.fakes[n])), None)
            if source is None:
                return False
            names.append(self._view(node.name if len(results) == 1 else f"{node.name}.{i}", result, self.holds[source]))
        self.holds[node] = names if isinstance(fake, (tuple, list)) else names[0]
        self.fakes[node] = fake
        return True

    def _outputs(self, node: fx.Node, fake: Any) -> list[str]:
        """Arena values for the results; a state that comes back is the state that went in."""
        results = list(fake) if isinstance(fake, (tuple, list)) else [fake]
        given = states_of(node)
        states = [None if n is None else self.holds[n] for n in given]
        names, fakes = [], []
        for i, result in enumerate(results[: len(results) - len(states)]):
            name = self._fresh(node.name if len(results) == 1 else f"{node.name}.{i}", result.dtype, tuple(self.graph.dim(s) for s in result.shape))
            names.append(name)
            with self.graph.fake_mode:
                fakes.append(torch.empty(result.shape, dtype=result.dtype))
        held, fake_held = [*names, *states], [*fakes, *(None if n is None else self.fakes[n] for n in given)]
        single = not isinstance(fake, (tuple, list))
        self.holds[node], self.fakes[node] = (held[0], fake_held[0]) if single else (held, fake_held)
        return names
