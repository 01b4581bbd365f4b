"""How an op of the dialect is defined: a schema, a reference, a fake rule, in one place.

`torch.ops.ingot.<name>` is pure: an op that updates a state takes the state and returns the new one. Its *reference*,
the plain Python function under the decorator, updates the state in place and returns only the other outputs: that is
the form an executor calls once a plan has proven that nobody reads the old state again (`Graph.verify`, linear use).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_LIBRARY = torch.library.Library("ingot", "DEF")

OPS: dict[str, Op] = {}
"""Every op of the dialect by its name without the namespace; tests are parametrized over it."""


@dataclass(frozen=True)
class Op:
    """One op. `states` names the arguments that are consumed and returned, last, in this order; one that a call leaves out (None) comes back empty."""

    name: str
    schema: str
    reference: Callable[..., Any]
    states: tuple[str, ...]
    rowwise: bool
    host_sync: bool

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.ingot, self.name).default

    @property
    def arguments(self) -> list[str]:
        return [a.name for a in self.overload._schema.arguments]


def op(
    schema: str, *, fake: Callable[..., Any], states: tuple[str, ...] = (), rowwise: bool = False, host_sync: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define `ingot::<schema>`; the decorated function is its reference.

    `schema` has no alias annotations: ``"rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor"``. `fake` computes the
    outputs' shapes and dtypes from fake inputs (state outputs excluded: they look like the state that came in).
    `rowwise` says that row t of every output depends on row t of the arguments that have rows, the first above all; `host_sync`, that the reference
    reads tensors on the host, so that it cannot be part of a CUDA graph.
    """
    name = schema.split("(", 1)[0]

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        spec = Op(name, schema, reference, states, rowwise, host_sync)
        OPS[name] = spec
        arguments = spec.arguments
        indices = [arguments.index(s) for s in states]

        def with_states(outputs: Any, new_states: list[torch.Tensor]) -> Any:
            if not states:
                return outputs
            head = () if outputs is None else outputs if isinstance(outputs, tuple) else (outputs,)
            result = (*head, *new_states)
            return result[0] if len(result) == 1 else result

        def absent(bound: list[Any]) -> torch.Tensor:
            return bound[0].new_empty(0)  # type: ignore[no-any-return]

        def impl(*args: Any, **kwargs: Any) -> Any:
            bound = _bind(spec, args, kwargs)
            for i in indices:
                bound[i] = bound[i] if bound[i] is None else bound[i].clone()
            return with_states(reference(*bound), [absent(bound) if bound[i] is None else bound[i] for i in indices])

        def fake_impl(*args: Any, **kwargs: Any) -> Any:
            bound = _bind(spec, args, kwargs)
            return with_states(fake(*bound), [absent(bound) if bound[i] is None else torch.empty_like(bound[i]) for i in indices])

        _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ingot::{name}", fake_impl, lib=_LIBRARY)
        return reference

    return register


def _bind(spec: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    declared = spec.overload._schema.arguments
    bound = list(args)
    for argument in declared[len(args) :]:
        if argument.name in kwargs:
            bound.append(kwargs[argument.name])
        else:
            bound.append(argument.default_value)
    return bound
