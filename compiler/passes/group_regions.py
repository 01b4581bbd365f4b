"""What no dialect op covers: neighbouring aten ops over one space of rows and columns become a region, which one kernel computes."""

from __future__ import annotations

import hashlib

import torch
from torch import fx

from ingot.ops import Graph, InputSpec
from ingot.ops.graph import VIEW_OPS, Region
from ingot.ops.target import Target

from ..call import region_call
from ..codegen.region import apart, claimed
from ..from_function import from_function


def group_regions(graph: Graph, target: Target) -> Graph:
    """mul(tanh(div(x, 30)), 30) → region(x). A group grows along producers as long as it can be run at one place and a kernel claims it."""
    grouping = _Grouping(graph.copy(), target)
    for group in grouping.groups():
        grouping.extract(group)
    grouping.graph.fx.lint()
    return grouping.graph


def example() -> Graph:
    def fn(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        h = torch.ops.ingot.linear(torch.where(x > 0, x, x.exp() - 1), w, None)
        return [torch.tanh(h / 30) * 30, h - h.mean(-1, keepdim=True)]

    return from_function(fn, {"x": InputSpec(torch.float32, ("T", 6))}, weights={"w": (torch.float32, (5, 6))})


class _Grouping:
    def __init__(self, graph: Graph, target: Target) -> None:
        self.graph, self.target = graph, target
        self.verdicts: dict[str, bool] = {}  # layers repeat
        self.number()

    def number(self) -> None:
        self.position = {n: i for i, n in enumerate(self.graph.fx.nodes)}

    def groups(self) -> list[set[fx.Node]]:
        of: dict[fx.Node, set[fx.Node]] = {}
        for node in self.graph.fx.nodes:
            if not _eligible(node):
                continue
            producers = [of[p] for p in node.all_input_nodes if p in of]
            group = {node}.union(*producers)
            if not self._fits(group):  # then as many of them as will
                group = {node}
                for producer in producers:
                    if self._fits(group | producer):
                        group |= producer
            if self._fits(group) or _boolean(node):
                of |= dict.fromkeys(group, group)
        return list({id(g): g for g in of.values()}.values())

    def _fits(self, group: set[fx.Node]) -> bool:
        return self._place(group) is not None and self._claimed(group)

    def extract(self, group: set[fx.Node]) -> None:
        """Replace a group by one node; one by one, when other groups have come between its members."""
        place = self._place(group)
        if place is None or not self._claimed(group):
            if len(group) > 1:
                for node in sorted(group, key=lambda n: self.position[n]):
                    self.extract({node})
            return
        region, inputs, outputs = self._region(group)
        with self.graph.fx.inserting_before(place):
            call = self.graph.fx.call_function(region, tuple(inputs))
            call.meta["val"] = outputs[0].meta["val"] if len(outputs) == 1 else tuple(o.meta["val"] for o in outputs)
            news = [call] if len(outputs) == 1 else [self.graph.getitem(call, i) for i in range(len(outputs))]
        for old, new in zip(outputs, news, strict=True):
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in group)
        for node in sorted(group, key=lambda n: -self.position[n]):
            self.graph.fx.erase_node(node)
        self.number()

    def _place(self, group: set[fx.Node]) -> fx.Node | None:
        """The node before which all inputs of a group are there and none of its results was used; None if there is no such place."""
        inputs = [self.position[i] for n in group for i in n.all_input_nodes if i not in group]
        users = [u for n in group for u in n.users if u not in group]
        first = min(users, key=lambda u: self.position[u], default=None)
        return first if first is not None and max(inputs, default=-1) < self.position[first] else None

    def _claimed(self, group: set[fx.Node]) -> bool:
        region, inputs, outputs = self._region(group)
        if not inputs:
            return False
        if region.name not in self.verdicts:
            call = region_call(self.graph, region, inputs, [o.meta["val"] for o in outputs])
            self.verdicts[region.name] = claimed(region, call, self.target)
        return self.verdicts[region.name]

    def _region(self, group: set[fx.Node]) -> tuple[Region, list[fx.Node], list[fx.Node]]:
        """The region of a group, named after its content; its inputs; the members whose value others use."""
        members = sorted(group, key=lambda n: self.position[n])
        inputs = list(dict.fromkeys(i for n in members for i in n.all_input_nodes if i not in group))
        outputs = [n for n in members if any(u not in group for u in n.users)]
        inner = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(inputs):
            copies[node] = inner.placeholder(f"x{i}")
            copies[node].meta["val"] = node.meta["val"]
        for node in members:
            copies[node] = inner.node_copy(node, lambda n: copies[n])
            copies[node].name = f"y{len(copies) - len(inputs) - 1}"
        returned = tuple(copies[o] for o in outputs)
        inner.output(returned[0] if len(returned) == 1 else returned)
        types = [(v.dtype, self.graph.shape(i)) if isinstance(v := i.meta["val"], torch.Tensor) else str(v) for i in inputs]
        content = f"{inner}{types}"
        if wide := apart(Region("", inner)):
            content += f"{sorted(wide)}"
        return Region(f"region_{hashlib.sha256(content.encode()).hexdigest()[:8]}", inner), inputs, outputs


_COPIES = frozenset({torch.ops.aten.clone, torch.ops.aten.contiguous})


def _eligible(node: fx.Node) -> bool:
    """An aten op that computes one tensor, and is no view."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or not isinstance(node.meta["val"], torch.Tensor):
        return False
    return target.overloadpacket not in VIEW_OPS | _COPIES and all(isinstance(i.meta["val"], torch.Tensor) for i in node.all_input_nodes)


def _boolean(node: fx.Node) -> bool:
    """Alone, a mask is no region; it may become part of one."""
    return node.meta["val"].dtype == torch.bool and torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]
