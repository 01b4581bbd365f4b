"""In-place ops of a recorded graph become pure ones."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx


def functional(module: fx.GraphModule, args: Sequence[torch.Tensor]) -> fx.GraphModule:
    """`module`, recorded by `make_fx` on `args`, without ops that change an argument.

    Where nothing aliases what is changed (`weights /= weights.sum()`), the op is exchanged for its pure form. Otherwise the
    whole is recorded again under torch's functionalization, which takes as long as recording it took.
    """
    for node in module.graph.nodes:
        if _is_mutable(node):
            _exchange(node)
    if not any(_is_mutable(n) for n in module.graph.nodes):
        return module
    pure = dispatch_functionalize(module.forward, FunctionalTensorMode(pre_dispatch=True, export=True))
    return make_fx(pure, tracing_mode="real", pre_dispatch=True)(*args)


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _exchange(node: Any) -> None:
    """`x.op_(…)` → `y = op(x, …)`, and y for x from there on."""
    namespace, name = node.target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    changed = node.args[0]
    alone = _is_fresh(changed) and not any(_is_view(user) for user in changed.users)
    # the pure op may promote to the dtype of another operand, which the op in place rounds back from
    alike = {n.meta["val"].dtype for n in node.all_input_nodes if n.meta["val"].is_floating_point()} <= {changed.meta["val"].dtype}
    if not name.endswith("_") or packet is None or node.target._overloadname not in packet.overloads() or not (alone and alike):
        return
    node.target = getattr(packet, node.target._overloadname)
    changed.replace_all_uses_with(node, delete_user_cb=lambda user: user > node)


def _is_fresh(node: Any) -> bool:
    """Whether a node's result is memory of its own."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return _is_fresh(node.args[0])
    return isinstance(node.target, torch._ops.OpOverload) and not _is_view(node) and not _is_mutable(node)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)
