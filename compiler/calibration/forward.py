"""A traced graph, run once by its references: weights come when they are read, values go when nobody reads them any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ingot.models.checkpoint import Checkpoint
from ingot.ops import Graph
from ingot.ops.graph import Recipe


class Forward:
    """`values`: of the nodes that have been run and are read again. `changed`: weights, by name, that are no longer the checkpoint's."""

    def __init__(self, graph: Graph, checkpoint: Checkpoint, device: torch.device) -> None:
        self.graph, self.checkpoint, self.device = graph, checkpoint, device
        self.values: dict[fx.Node, Any] = {}
        self.changed: dict[str, torch.Tensor] = {}

    def weight(self, name: str) -> torch.Tensor:
        """A weight as the checkpoint has it, before rounding, or as it was changed."""
        if name in self.changed:
            return self.changed[name]
        weight = self.graph.weights[name]
        return unrounded(weight.recipe).run(self.checkpoint.tensors, self.graph.constants).to(self.device, weight.dtype)

    def run(self, inputs: dict[str, torch.Tensor], before: Callable[[fx.Node], None]) -> None:
        """Run the graph; `before` is called with each node when its arguments are there."""
        nodes = list(self.graph.fx.nodes)
        last = {argument: node for node in nodes for argument in node.all_input_nodes}
        units = {s.group: _units(s.group, inputs) for s in self.graph.states.values()}

        def value(node: fx.Node) -> Any:
            if node in self.values:
                return self.values[node]
            if node.name in inputs:
                return inputs[node.name]
            if node.name in self.graph.states:
                state = self.graph.states[node.name]
                return torch.zeros(units[state.group], *state.shape, dtype=state.dtype, device=self.device)
            return self.weight(node.name)

        with torch.no_grad():
            for node in nodes:
                if node.op != "call_function":
                    continue
                before(node)
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                kwargs = {k: self.device if k == "device" else v for k, v in kwargs.items()}
                self.values[node] = node.target(*args, **kwargs)
                for argument in node.all_input_nodes:
                    if last[argument] is node:
                        self.values.pop(argument, None)
                        self.changed.pop(argument.name, None)
                if not node.users:
                    del self.values[node]


def unrounded(recipe: Recipe) -> Recipe:
    """The weight that a recipe which quantizes rounds."""
    return recipe.inputs[0].inputs[0] if recipe.op == "dequantize" and recipe.inputs[0].op == "quantize" else recipe


def step_inputs(graph: Graph, texts: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """One step that holds every sequence whole, each on pages of its own."""
    count, length = len(texts), len(texts[0])
    inputs = {
        "input_ids": torch.tensor(texts).flatten(),
        "positions": torch.arange(length).repeat(count),
        "cu_seqlens_q": torch.arange(count + 1) * length,
        "seq_lens": torch.full((count,), length),
        "logits_rows": torch.arange(count) * length,
        "state_slots": torch.arange(count),
    }
    for state in graph.states.values():
        if state.kind == "page":
            page_size = state.shape[1]
            columns = -(-length // page_size)
            inputs[f"page_table_{state.group}"] = torch.arange(count * columns).view(count, columns)
            inputs[f"slot_mapping_{state.group}"] = (torch.arange(count)[:, None] * columns * page_size + torch.arange(length)).flatten()
    return {n: v.to(device, torch.int32) for n, v in inputs.items() if n in graph.inputs}


def _units(group: str, inputs: dict[str, torch.Tensor]) -> int:
    """Pages or slots of a group of states."""
    table = inputs.get(f"page_table_{group}")
    return len(inputs["seq_lens"]) if table is None else table.numel()
