"""`torch.compile(fn, backend="ingot")`: a function of CPU tensors through the passes, kernel families and gate of a model's compilation.

For inference. What no kernel computes runs as its reference or as torch's own op, as in an artifact.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo import register_backend

from ingot.artifacts import gate
from ingot.artifacts.bound import Loaded
from ingot.artifacts.settings import settings
from ingot.artifacts.store import Store
from ingot.models.canonical import canonicalize
from ingot.ops import Graph, InputSpec
from ingot.ops.errors import IngotError
from ingot.ops.kernel import Call, Steps
from ingot.ops.target import host

from .call import call_of
from .codegen.emit import Emitter
from .from_function import from_function
from .pipeline import lower
from .plan import Choice
from .select import Program, select
from .tuning import Table
from .variants import VariantSpec

_STEPS = Steps(max_tokens=1, max_seqs=1, max_num_new=1, max_rows=1, exact=False)  # all sizes are numbers
_DEVICE = torch.device("cpu")


class TorchBackendError(IngotError):
    """A function that `torch.compile(backend="ingot")` does not compile."""


@register_backend(name="ingot")  # type: ignore[misc]
def backend(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compiles at the first call with each set of shapes. Parameters are packed then, and again when they have changed.

    Raises, at that call, TorchBackendError for tensors that are on another device or need gradients, GraphError for a function that
    changes its arguments.
    """
    return _Compiled(module)


@dataclass
class _Compiled:
    module: fx.GraphModule
    programs: dict[tuple[Any, ...], _Program] = field(default_factory=dict)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        key = tuple((a.dtype, tuple(a.shape), isinstance(a, torch.nn.Parameter)) if isinstance(a, torch.Tensor) else a for a in args)
        for a in args:
            if isinstance(a, torch.Tensor) and a.device != _DEVICE:
                raise TorchBackendError(f"a tensor is on {a.device}, and this backend compiles for the CPU; move it, or compile a model for a GPU")
            if isinstance(a, torch.Tensor) and a.requires_grad and torch.is_grad_enabled():
                raise TorchBackendError("a tensor requires gradients, and this backend is for inference; call within torch.no_grad()")
        if key not in self.programs:
            self.programs[key] = _compile(self.module, args)
        return self.programs[key](args)


@dataclass
class _Program:
    """A lowered graph, and the kernels that compute its calls."""

    graph: Graph
    names: dict[str, int]  # inputs and unpacked weights → place among the arguments
    runner: _Runner
    packed: dict[str, torch.Tensor] = field(default_factory=dict)
    packed_from: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, args: Sequence[Any]) -> tuple[Any, ...]:
        parameters = {n: args[i] for n, i in self.names.items() if n not in self.graph.inputs}
        state = [(p.data_ptr(), p._version) for p in parameters.values()]
        if state != self.packed_from:
            self.packed = {n: w.recipe.run(parameters, self.graph.constants).detach().contiguous() for n, w in self.graph.weights.items()}
            self.packed_from = state
        values = {n: args[i] for n, i in self.names.items() if n in self.graph.inputs} | self.packed
        return tuple(self.runner.run(*(values[n] for n in self.graph.placeholders)))


class _Runner(fx.Interpreter):
    """Interprets a graph, each call by the kernels that were chosen for it."""

    def __init__(self, graph: Graph, chosen: dict[str, tuple[Call, Choice]], loaded: dict[str, Loaded | None]) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), graph.fx))
        self.chosen, self.loaded = chosen, loaded

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.chosen:
            return super().run_node(n)
        call, choice = self.chosen[n.name]
        assert choice.candidate is not None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        inputs = {**call.args, **dict(zip(call.args, args, strict=False)), **kwargs}
        inputs = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        outputs, run = gate.bind(choice.candidate, call, inputs, {}, [self.loaded.get(k) for k in choice.kernels])
        run()
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _compile(module: fx.GraphModule, args: Sequence[Any]) -> _Program:
    target = host()
    tensors = {f"arg{i}": a for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
    inputs = {n: InputSpec(a.dtype, tuple(a.shape)) for n, a in tensors.items() if not isinstance(a, torch.nn.Parameter)}
    weights = {n: (a.dtype, tuple(a.shape)) for n, a in tensors.items() if isinstance(a, torch.nn.Parameter)}

    def fn(**values: torch.Tensor) -> list[Any]:
        return list(module(*(values.get(f"arg{i}", a) for i, a in enumerate(args))))

    with torch.no_grad():
        traced = canonicalize(from_function(fn, inputs, weights=weights))
    graph, _ = lower(traced, target)
    loaded: dict[str, Loaded | None] = {}
    store = Store(settings().home)
    with tempfile.TemporaryDirectory(prefix="ingot-kernels-") as folder, Emitter(target, store, Path(folder), lambda done, of: None) as emitter:

        def emit(sources: Any) -> Any:
            for source, (kernel, function) in emitter(sources):
                loaded[kernel.name] = function
                yield source, (kernel, function)

        calls = {n.name: call for n in graph.fx.nodes if n.op == "call_function" and (call := call_of(graph, n)) is not None}
        program = Program(graph, list(calls.values()), [VariantSpec("function", _STEPS)])
        selection = select([program], target, emit, _DEVICE, lambda done, of: None, Table())
    choose = selection.choose(_STEPS)
    chosen = {name: (call, choose(call)) for name, call in calls.items() if not gate.states(call) and choose(call).candidate is not None}
    return _Program(graph, {f"arg{i}": i for i in range(len(args)) if f"arg{i}" in tensors}, _Runner(graph, chosen, loaded))
