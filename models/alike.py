"""Recording a call as one before it was: the layers of a model call the same ops on tensors of the same types.

Torch's fake rules for symbolic sizes, and what its recorder does around them, take milliseconds a call. That is spent on the first of calls that are alike.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_impls import fast_detach
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import proxy_tensor, symbolic_shapes
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, _ProxyTensor, fetch_sym_proxy
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from ingot.ops.graph import type_of

from .swaps import Patch

UNREAD = (
    Patch(symbolic_shapes, "uninteresting_files", frozenset),  # where a size was made: to know that, torch imports most of its compiler
    Patch(proxy_tensor, "_extract_tensor_metadata", lambda value: None),  # what `val` says too
)
"""Without what `make_fx` finds out about sizes and nodes and nobody here reads."""


class Alike:
    """While its patch is in force, `make_fx` computes the first of calls that are alike, and records the others."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._seen: dict[Any, Any] = {}  # what a node says of its result, by target and types of arguments

    @property
    def patch(self) -> Patch:
        compute = ProxyTorchDispatchMode.__torch_dispatch__

        def dispatch(recorder: Any, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
            kwargs = kwargs or {}
            key = self._key(recorder.tracer, func, args, kwargs)
            if key in self._seen:
                return self._recorded(recorder.tracer, func, args, kwargs, self._seen[key])
            result = compute(recorder, func, types, args, kwargs)
            if key is not None and _is_new(result, args, kwargs):
                alone = isinstance(result, torch.Tensor)
                node = recorder.tracer.tensor_tracker[result if alone else result[0]].proxy.node
                self._seen[key] = (node if alone else node.args[0]).meta["val"]  # not `result`, which may be changed in place
            return result

        return Patch(ProxyTorchDispatchMode, "__torch_dispatch__", dispatch)

    def _key(self, tracer: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """None for a call that has to be computed: it changes its argument, or is given what `make_fx` knows the values of."""
        if not isinstance(func, torch._ops.OpOverload) or func._schema.is_mutable:
            return None
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                slot = tracer.tensor_tracker.get(leaf)
                if type(leaf) is not FakeTensor or leaf.dtype.is_complex or slot is None or slot.constant is not None:
                    return None
            elif isinstance(leaf, torch.SymFloat | torch.SymBool):
                return None
        return func, type_of(args), type_of(kwargs)

    def _recorded(self, tracer: Any, func: Any, args: Any, kwargs: Any, like: Any) -> Any:
        symbolic = fetch_sym_proxy(tracer)

        def node_of(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return tracer.tensor_tracker[value].proxy.node
            if isinstance(value, torch.SymInt):
                value = symbolic(value)
                return value.node if isinstance(value, fx.Proxy) else value
            return value

        args, kwargs = fx.node.map_aggregate((tuple(args), kwargs), node_of)
        name = tracer.graph._target_to_str(func.overloadpacket.__name__)
        node = tracer.graph.create_node("call_function", func, args, kwargs, name)
        if isinstance(like, FakeTensor):
            return self._tracked(tracer, node, like)
        node.meta["val"] = like
        return type(like)(self._tracked(tracer, tracer.graph.create_node("call_function", operator.getitem, (node, i)), one) for i, one in enumerate(like))

    def _tracked(self, tracer: Any, node: fx.Node, like: FakeTensor) -> FakeTensor:
        node.meta["val"] = like
        result = fast_detach(self._mode, like)
        tracer.tensor_tracker[result] = _ProxyTensor(fx.Proxy(node, tracer), None)
        return result


def _is_new(result: Any, args: Any, kwargs: Any) -> bool:
    """Whether a result is tensors that the call made, in sizes that do not depend on data. (`contiguous` may return what it was given.)"""
    results = result if isinstance(result, list | tuple) else [result]
    given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
    return bool(results) and all(type(r) is FakeTensor and id(r) not in given for r in results) and not free_unbacked_symbols(results)
