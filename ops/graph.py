"""Graph: a program of the dialect, one type from trace to emission.

A `torch.fx` graph whose calls are `torch.ops.ingot.*`, a short list of pure aten ops, or a `Region` (a subgraph that one
kernel will compute). Placeholders are the step inputs, the states and the weights; what each is stands beside the graph.
Every node carries a fake tensor in `meta["val"]`; its symbolic sizes are named by `symbols`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from . import formats
from .dialect import OPS
from .dims import Dim, show
from .errors import IngotError


class GraphError(IngotError):
    """A graph breaks a rule of the dialect; the message names the node and the rule."""


@dataclass(frozen=True)
class InputSpec:
    """A step input: what the batch provides. Sizes are symbol names or numbers."""

    dtype: torch.dtype
    shape: tuple[str | int, ...]


@dataclass(frozen=True)
class StateSpec:
    """A tensor that outlives the step. `kind`: "page" has shape [N, heads, page_size, …], "slot" [slots, *shape]."""

    group: str  # "full", "window<w>", "slot", …: sequences share one page table (or slot) per group
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # without the leading number of pages or slots


@dataclass(frozen=True)
class Recipe:
    """How a weight is made from checkpoint tensors: a small expression tree that can be read, stored and run anywhere.

    `op`: "tensor" (name) · "cat" (dim) · "stack" (dim) · "slice" (dim, begin, end) · "transpose" (dim0, dim1) ·
    "reshape" (*shape) · "index" (dim; the second input's numbers of the first) · "argsort" () · "constant" (name of a tensor kept
    with the graph) · "seed" (seed, mean, std: dummy weights, drawn by `ops.dummy.generate`; the shape is the weight's own, so it
    stands at the root).

    Of checkpoints that pack codes: "unpack" (bits, count, order) of int32 [R, W] is uint8 [R, count], codes from the low bits up, or
    in `order` within a word · "add_codes" (amount, bits) · "expand" (*shape).

    Of quantized weights (`ops.formats`): "quantize" (format, part) of a float weight is a plain part · "dequantize" (format,
    activation, dtype of scales, n, k) of plain parts, and a scale for activations if there is one, is a float weight [n, k] · "pack"
    (format, layout, part, n, k, pieces) of plain parts is a packed part.
    """

    op: str
    params: tuple[Any, ...] = ()
    inputs: tuple[Recipe, ...] = ()

    @property
    def reshaped(self) -> Recipe:
        """What a reshape at the root gives another shape; the recipe itself, if there is none."""
        return self.inputs[0] if self.op == "reshape" else self

    @property
    def sources(self) -> list[str]:
        """Names of the checkpoint tensors it reads, in order."""
        return [self.params[0]] if self.op == "tensor" else [s for i in self.inputs for s in i.sources]

    def substituted(self, recipes: Mapping[str, Recipe]) -> Recipe:
        """The recipe over other tensors: those named in `recipes` are made by them."""
        if self.op == "tensor":
            return recipes.get(self.params[0], self)
        return replace(self, inputs=tuple(i.substituted(recipes) for i in self.inputs)) if self.inputs else self

    def run(self, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor], memo: dict[Any, Any] | None = None) -> torch.Tensor:
        """The weight, from checkpoint tensors by name. Parts that are made together are kept in `memo` for the next that asks."""
        memo = {} if memo is None else memo
        if self.op in ("quantize", "pack"):
            return self._part(tensors, constants, memo)
        values = [i.run(tensors, constants, memo) for i in self.inputs]
        match self.op:
            case "tensor":
                return tensors[self.params[0]]
            case "constant":
                return constants[self.params[0]]
            case "cat":
                return torch.cat(values, self.params[0])
            case "stack":
                return torch.stack(values, self.params[0])
            case "slice":
                dim, begin, end = self.params
                return values[0].narrow(dim, begin, end - begin)
            case "transpose":
                return values[0].transpose(*self.params)
            case "reshape":
                return values[0].reshape(self.params)
            case "index":
                return values[0].index_select(self.params[0], values[1])
            case "argsort":
                return values[0].argsort(stable=True)
            case "expand":
                return values[0].expand(self.params)
            case "unpack":
                return formats.unpacked_words(values[0], *self.params)
            case "add_codes":
                amount, bits = self.params
                return values[0].to(torch.int32).add(amount).bitwise_and((1 << bits) - 1).to(torch.uint8)
            case "dequantize":
                form = formats.get(self.params[0])
                return form.dequantize(dict(zip(form.parts, values, strict=False)))
        raise GraphError(f"recipe op {self.op!r} is unknown")

    def _part(self, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor], memo: dict[Any, Any]) -> torch.Tensor:
        """One of the parts that "quantize" and "pack" make together."""
        form = formats.get(self.params[0])
        part = self.params[1] if self.op == "quantize" else self.params[2]
        key = (self.op, form.name, *(() if self.op == "quantize" else (self.params[1], self.params[5])), self.inputs)
        if key not in memo:
            values = [i.run(tensors, constants, memo) for i in self.inputs]
            if self.op == "quantize":
                memo[key] = form.quantize(values[0])
            else:
                _, layout, _, _, _, pieces = self.params
                memo[key] = formats.packed(dict(zip(form.parts, values, strict=True)), form.name, layout, pieces)
        return memo[key][part]


@dataclass(frozen=True)
class Weight:
    """A weight placeholder: how to make it, and what it is then."""

    recipe: Recipe
    dtype: torch.dtype
    shape: tuple[int, ...]


# Pure, and understood by every pass that asks what an op does to rows. `frontend` functionalizes the rest away.
_aten = torch.ops.aten
VIEW_OPS = frozenset(
    getattr(_aten, name)
    for name in ("view reshape transpose permute unsqueeze squeeze slice select expand t unflatten flatten split split_with_sizes chunk unbind alias".split())
)
ATEN_DENY_TAGS = (torch.Tag.nondeterministic_seeded,)


class Region:
    """A subgraph of pure ops that is one node of the outer graph and becomes one kernel; calling it interprets it."""

    def __init__(self, name: str, graph: fx.Graph) -> None:
        self.__name__ = self.name = name
        self.module = fx.GraphModule(torch.nn.Module(), graph)

    def __call__(self, *args: Any) -> Any:
        return fx.Interpreter(self.module).run(*args)

    def __repr__(self) -> str:
        return self.name

    @property
    def arguments(self) -> list[str]:
        return [n.name for n in self.module.graph.nodes if n.op == "placeholder"]


@dataclass
class Graph:
    """The program. `outputs` of the fx graph: the entry's results, then every state in the order of `states`."""

    fx: fx.Graph
    inputs: dict[str, InputSpec]
    states: dict[str, StateSpec]
    weights: dict[str, Weight]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)  # name of the symbol in meta["val"] sizes ("s77") → "T", "S", …
    num_results: int = 1
    entry_point: str = "forward"
    _fakes: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # results of fake rules by target and types of arguments
    _dims: dict[Any, Dim] = field(default_factory=dict, repr=False, compare=False)  # linear forms by expression

    def copy(self) -> Graph:
        """A graph whose nodes may be changed without touching this one."""
        new = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        output = new.graph_copy(self.fx, mapping)
        node = new.output(output)
        node.meta = copy.copy(self.fx.output_node().meta)
        return replace(self, fx=new, inputs=dict(self.inputs), states=dict(self.states), weights=dict(self.weights), constants=dict(self.constants))

    @property
    def placeholders(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.fx.nodes if n.op == "placeholder"}

    @property
    def fake_mode(self) -> FakeTensorMode:
        for node in self.fx.nodes:
            if isinstance(node.meta.get("val"), FakeTensor):
                return node.meta["val"].fake_mode
        raise GraphError("no node carries a fake tensor")

    def dim(self, size: int | torch.SymInt) -> Dim:
        """A size of a fake tensor as a linear form over step sizes; GraphError when it is not one."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self._dims:
            self._dims[expr] = self._linear(expr)
        return self._dims[expr]

    def _linear(self, expr: Any) -> Dim:
        import sympy

        if expr.is_Integer:
            return int(expr)
        poly = sympy.Poly(expr, *sorted(expr.free_symbols, key=str))
        form: dict[str, int] = {}
        for powers, coefficient in poly.terms():
            if sum(powers) > 1 or not coefficient.is_Integer:
                raise GraphError(f"size {expr} is not linear in {sorted(map(str, expr.free_symbols))}")
            name = "" if sum(powers) == 0 else str(poly.gens[powers.index(1)])
            form[self.symbols.get(name, name)] = int(coefficient)
        return form

    def shape(self, node: fx.Node) -> tuple[Dim, ...]:
        return tuple(self.dim(s) for s in node.meta["val"].shape)

    def call(self, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
        """Insert a call at the current insertion point, with its fake value computed by the op's fake rule."""
        node = self.fx.call_function(target, args)
        node.meta["val"] = self.fake(target, args)
        if like is not None:
            node.meta.update({k: v for k, v in like.meta.items() if k != "val"})
        return node

    def getitem(self, node: fx.Node, index: int) -> fx.Node:
        """Insert the `index`-th result of a call with several."""
        item = self.fx.call_function(operator.getitem, (node, index))
        item.meta["val"] = node.meta["val"][index]
        return item

    def add_weight(self, name: str, weight: Weight) -> fx.Node:
        """A new weight placeholder, after the others."""
        last = list(self.placeholders.values())[-1]
        with self.fx.inserting_after(last):
            node = self.fx.placeholder(name)
        if node.name != name:
            raise GraphError(f"weight {name} exists already")
        with self.fake_mode:
            node.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype)
        self.weights[name] = weight
        return node

    def fake(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """The fake result of a call whose arguments are nodes. Calls with arguments of the same types share it: a model's layers are alike."""
        values, kw = fx.map_arg((args, kwargs or {}), lambda n: n.meta["val"])
        key = (target, type_of(values), type_of(kw))
        if key in self._fakes:
            return self._fakes[key]
        from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # here, because it brings sympy, which a runtime does not need

        with self.fake_mode:
            result = target(*values, **kw)
        if not free_unbacked_symbols(result):  # a size that depends on data is this call's own
            self._fakes[key] = result
        return result

    def run(self, values: Mapping[str, torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Interpret with the references: placeholder values by name → (results, new states)."""
        module = fx.GraphModule(torch.nn.Module(), self.fx)
        missing = [n for n in self.placeholders if n not in values]
        if missing:
            raise GraphError(f"no value for {', '.join(missing)}")
        outputs = fx.Interpreter(module).run(*(values[n] for n in self.placeholders))
        return list(outputs[: self.num_results]), dict(zip(self.states, outputs[self.num_results :], strict=True))

    def verify(self) -> None:
        """GraphError if a call is outside the dialect, lacks a value, a state is not used linearly, or a size that steps differ in became a number."""
        self.fx.lint()
        declared = set(self.inputs) | set(self.states) | set(self.weights)
        if set(self.placeholders) != declared:
            raise GraphError(f"placeholders and declarations differ: {sorted(set(self.placeholders) ^ declared)}")
        for name, spec in self.inputs.items():
            sizes = self.placeholders[name].meta["val"].shape
            if fixed := [f"{n} is {s}" for n, s in zip(spec.shape, sizes, strict=True) if isinstance(n, str) and isinstance(self.dim(s), int)]:
                raise GraphError(f"input {name}: {', '.join(fixed)} in this graph and no other: something asked for the value of a size")
        for node in self.fx.nodes:
            if node.op == "call_function":
                _verify_target(node)
            elif node.op not in ("placeholder", "output"):
                raise GraphError(f"{node.name}: a {node.op} node is not of the dialect")
            if node.op != "output" and "val" not in node.meta:
                raise GraphError(f"{node.name}: no fake value")
        self._verify_states()

    def _verify_states(self) -> None:
        position = {n: i for i, n in enumerate(self.fx.nodes)}
        final = dict(zip(self.states, self.fx.output_node().args[0][self.num_results :], strict=True))
        for name in self.states:
            version = self.placeholders[name]
            while True:
                writers = [(u, i) for u in version.users for i in consumed(u) if u.args[i] is version]
                if len(writers) > 1:
                    raise GraphError(f"state {name} is consumed twice, by {' and '.join(u.name for u, _ in writers)}")
                if not writers:
                    break
                writer, index = writers[0]
                late = [u.name for u in version.users if position[u] > position[writer] and u.op != "output"]
                if late or final[name] is version:
                    raise GraphError(f"state {name}: {', '.join(late) or 'the output'} reads a version that {writer.name} has consumed")
                version = new_version(writer, index)
            if final[name] is not version:
                raise GraphError(f"state {name}: its last version is {version.name}, the output returns {final[name]}")

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """One line a node: `name: dtype[shape] = op(args)`; a region's own follow it, indented."""
        for node in self.fx.nodes:
            if node.op == "placeholder":
                kind = "input" if node.name in self.inputs else "state" if node.name in self.states else "weight"
                yield f"{kind} {node.name}: {self._type(node.meta['val'])}"
            elif node.op == "call_function":
                yield self._call(node)
                if isinstance(node.target, Region):
                    yield from (f"    {self._call(inner)}" for inner in node.target.module.graph.nodes if inner.op == "call_function")
            else:
                yield f"return {', '.join(_show(a) for a in node.args[0])}"

    def _call(self, node: fx.Node) -> str:
        args = ", ".join([_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()])
        return f"{node.name}: {self._type(node.meta['val'])} = {target_name(node.target)}({args})"

    def _type(self, value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(self._type(v) for v in value) + ")"
        if not isinstance(value, torch.Tensor):
            return type(value).__name__
        sizes = ", ".join(show(self.dim(s)) for s in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def type_of(value: Any) -> Any:
    """What a fake rule may see of an argument, hashable: equal for arguments that are alike."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return value.dtype, value.device, tuple(s if isinstance(s, int) else s.node.expr for s in sizes)
    if isinstance(value, (list, tuple)):
        return list, *map(type_of, value)
    if isinstance(value, dict):
        return dict, *((k, type_of(v)) for k, v in value.items())
    if isinstance(value, torch.SymInt):
        return torch.SymInt, value.node.expr
    return type(value), value  # 1, 1.0 and True are equal, and promote differently


def consumed(node: fx.Node) -> list[int]:
    """Indices of the arguments that a node consumes: the states that it is given."""
    return [node.args.index(state) for state in states_of(node) if state is not None]


def states_of(node: fx.Node) -> list[fx.Node | None]:
    """The states that a node takes, in the order of its op's; None for one that it leaves out."""
    spec = op_of(node)
    indices = [] if spec is None else [spec.arguments.index(s) for s in spec.states]
    return [node.args[i] if i < len(node.args) else None for i in indices]  # type: ignore[misc]


def new_version(writer: fx.Node, index: int) -> fx.Node:
    """The node that holds the state which `writer` returns for its argument `index`."""
    spec = op_of(writer)
    if not isinstance(writer.meta["val"], (tuple, list)):
        return writer
    place = len(writer.meta["val"]) - len(spec.states) + spec.states.index(spec.arguments[index])
    for user in writer.users:
        if user.target is operator.getitem and user.args[1] == place:
            return user
    raise GraphError(f"{writer.name}: nobody takes the new state {place} that it returns")


def op_of(node: fx.Node) -> Any:
    """The dialect op that a node calls, or None."""
    target = node.target
    if node.op == "call_function" and getattr(target, "namespace", None) == "ingot":
        return OPS[target._schema.name.split("::")[1]]
    return None


def _verify_target(node: fx.Node) -> None:
    target = node.target
    if target is operator.getitem or isinstance(target, Region) or op_of(node) is not None:
        return
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        if target._schema.is_mutable:
            raise GraphError(f"{node.name}: {target} changes its argument; a graph is pure")
        if any(t in target.tags for t in ATEN_DENY_TAGS):
            raise GraphError(f"{node.name}: {target} is random; a graph is deterministic")
        return
    if target in _SIZE_ARITHMETIC:
        return
    raise GraphError(f"{node.name}: {target} is not of the dialect")


_SIZE_ARITHMETIC = frozenset({operator.add, operator.sub, operator.mul, operator.floordiv, torch.ops.aten.sym_size.int})


def target_name(target: Any) -> str:
    """`ingot.rms_norm`, `aten.mul.Tensor`, a region's name."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _show(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_show(a) for a in arg) + "]"
    return repr(arg) if isinstance(arg, str) else str(arg).removeprefix("torch.")
