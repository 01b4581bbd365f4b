"""Which weights of a traced graph are quantized, and to what; said as recipes, which the passes then carry along.

A quantized weight is one whose recipe dequantizes parts. To everything that reads the graph it is an ordinary weight, until
`passes/quantize_linears.py` lets kernels read the parts themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ingot.models.quantization import Method
from ingot.ops import Graph, Recipe, Weight, formats
from ingot.ops.errors import IngotError
from ingot.ops.graph import op_of
from ingot.ops.target import Target


class QuantizationError(IngotError):
    """What is to be quantized contradicts itself, or the model."""


_PRODUCTS = (torch.ops.ingot.linear.default, torch.ops.ingot.linear_add.default, torch.ops.ingot.linear_glu.default)
ALGORITHMS = ("gptq", "awq")
"""What `--calibrate` may round with: the names of `calibration.ALGORITHMS`, which costs an import."""
ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)\.weight$")
"""Weights that choose experts: a rounding there changes which expert a token gets, and they are small."""


def expert_formats(target: Target) -> tuple[str, ...]:
    """What kernels of `quantized_moe` read. Rows of activations are rounded as these want it, whatever a checkpoint or a flag would have of them."""
    float8 = target.kind == "cuda" and target.arch >= 89
    return tuple(name for name in formats.names() if float8 or not name.startswith("fp8"))


Choose = Callable[[str, bool], tuple[str, str] | None]
"""(name of a weight, whether it is the LM head) → (format, activation), or None to leave it as it is."""


@dataclass(frozen=True)
class Quantized:
    """What a recipe that dequantizes is made of: plain parts in the format's order."""

    format: str
    activation: str
    dtype: str  # of scales
    n: int
    k: int
    parts: tuple[Recipe, ...]
    input_scale: Recipe | None = None
    order: Recipe | None = None  # the checkpoint's columns in the order of the parts', where that is not their own

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for weights whose parts can be joined into one weight's."""
        alone = self.parts if self.n % formats.get(self.format).rows else None
        return self.format, self.activation, self.dtype, self.k, self.input_scale, self.order, alone


def read(recipe: Recipe) -> Quantized | None:
    """The parts of a weight's recipe, through joins and slices of rows and permuted columns; None where there are none to be had."""
    match recipe.op:
        case "dequantize":
            form, activation, dtype, n, k = recipe.params
            count = len(formats.get(form).parts)
            return Quantized(form, activation, dtype, n, k, recipe.inputs[:count], recipe.inputs[count] if len(recipe.inputs) > count else None)
        case "index":
            inner, (turn, order) = read(recipe.inputs[0]), (recipe.inputs[1].op, recipe.inputs[1].inputs)
            if inner is not None and inner.order is None and recipe.params == (1,) and turn == "argsort":
                return replace(inner, order=order[0])
        case "cat":
            pieces = [read(i) for i in recipe.inputs]
            first = pieces[0]
            if recipe.params == (0,) and first is not None and all(p is not None and p.signature == first.signature for p in pieces):
                joined = tuple(Recipe("cat", (0,), parts) for parts in zip(*(p.parts for p in pieces), strict=True))
                return replace(first, n=sum(p.n for p in pieces), parts=joined)
        case "slice":
            inner, (dim, begin, end) = read(recipe.inputs[0]), recipe.params
            if inner is not None and dim == 0:
                rows = formats.get(inner.format).rows
                if begin % rows == 0 and (end % rows == 0 or end == inner.n):
                    parts = tuple(Recipe("slice", (0, begin // rows if i else begin, -(-end // rows) if i else end), (p,)) for i, p in enumerate(inner.parts))
                    return replace(inner, n=end - begin, parts=parts)
    return None


def read_experts(recipe: Recipe) -> Quantized | None:
    """The parts of the matrices of all experts, one after another, of the recipe of a weight [X, N, K]; None where there are none to be had."""
    if recipe.op == "reshape":
        return read(recipe.inputs[0])
    if recipe.op == "stack" and recipe.params == (0,):
        matrices = list(recipe.inputs)
    elif recipe.op == "cat" and recipe.params == (1,) and all(i.op == "stack" and i.params == (0,) for i in recipe.inputs):
        matrices = [Recipe("cat", (0,), rows) for rows in zip(*(i.inputs for i in recipe.inputs), strict=True)]  # gate and up of each
    else:
        return None
    pieces = [read(m) for m in matrices]
    first = pieces[0]
    kind = lambda q: (q.format, q.dtype, q.n, q.k, q.order)
    if first is None or first.order is not None or first.n % formats.get(first.format).rows or any(p is None or kind(p) != kind(first) for p in pieces):
        return None
    parts = tuple(Recipe("cat", (0,), same) for same in zip(*(p.parts for p in pieces if p is not None), strict=True))
    return replace(first, activation="none", n=first.n * len(pieces), parts=parts, input_scale=None)


def signature(graph: Graph, weight: fx.Node) -> tuple[Any, ...] | None:
    """Equal for weights that may be joined along their rows: those that are not quantized, and those whose parts can be."""
    found = read(graph.weights[weight.name].recipe)
    return None if found is None else found.signature


@dataclass(frozen=True)
class Request:
    """What `--quantize`, `--quantize-exclude` and `--calibrate` say together. `method` is "none", or a name of `formats.ONLINE`."""

    method: str = "none"
    exclude: tuple[str, ...] = ()
    algorithm: str = ""
    text: Path | None = None

    @classmethod
    def of(cls, quantize: str, exclude: str, calibrate: str, in_checkpoint: Method | None, dummy: bool) -> Request:
        """QuantizationError, or FormatError, when they contradict one another or the checkpoint."""
        patterns = tuple(e for e in exclude.split(",") if e)
        method, algorithm = next(((quantize.removesuffix(f"-{a}"), a) for a in ALGORITHMS if quantize.endswith(f"-{a}")), (quantize, ""))
        if method != "none" and (method not in formats.ONLINE or (algorithm and not method.startswith("int4"))):
            calibrated = ", ".join(f"int4-g128-{a}" for a in ALGORITHMS)
            raise QuantizationError(f"--quantize {quantize} is unknown: use none, {', '.join(formats.ONLINE)}, or with --calibrate {calibrated} (or g32, g64)")
        if method != "none" and in_checkpoint is not None:
            raise QuantizationError(f"--quantize {quantize}: the checkpoint is quantized already ({in_checkpoint.name}); leave the flag out")
        if method == "none" and patterns:
            raise QuantizationError("--quantize-exclude names weights that --quantize leaves alone; give --quantize too")
        if algorithm and not calibrate:
            raise QuantizationError(f"--quantize {quantize} needs --calibrate FILE: a text like what the model will read")
        if calibrate and not algorithm:
            raise QuantizationError(f"--calibrate goes with --quantize int4-g128-gptq or int4-g128-awq, not with {quantize}, which rounds to nearest")
        if calibrate and dummy:
            raise QuantizationError("--calibrate has nothing to learn from --dummy-weights; leave one of the two out")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as e:
                raise QuantizationError(f"--quantize-exclude {pattern} is not a regular expression: {e}") from None
        return cls(method, patterns, algorithm, Path(calibrate) if calibrate else None)


def choose_online(request: Request, target: Target) -> Choose:
    """What a request does to each weight."""
    everywhere = formats.online(request.method, target)
    head = formats.LM_HEAD.get(target.kind)

    def choose(name: str, is_head: bool) -> tuple[str, str] | None:
        if ROUTERS.search(name) or any(re.search(e, name) or (is_head and re.search(e, "lm_head.weight")) for e in request.exclude):
            return None
        if is_head:
            return None if head is None else (head, formats.get(head).activation(target))
        return everywhere

    return choose


def choose_as(method: Method) -> Choose:
    """What a quantized checkpoint would have of each weight, for dummy weights: LM heads and routers are left alone by those who make them."""
    return lambda name, is_head: None if is_head or ROUTERS.search(name) else method.scheme(name.removesuffix(".weight"))


def with_activations(recipe: Recipe, target: Target) -> Recipe:
    """Where nothing is said about activations, kernels of the target have them as their format wants."""
    if recipe.op != "dequantize":
        return replace(recipe, inputs=tuple(with_activations(i, target) for i in recipe.inputs)) if recipe.inputs else recipe
    form, activation, *rest = recipe.params
    return replace(recipe, params=(form, formats.get(form).activation(target) if activation == "none" else activation, *rest))


def quantize_weights(graph: Graph, choose: Choose, experts: Collection[str] = ()) -> Graph:
    """The graph with quantized weights: those of linear layers for which `choose` names a format, and of experts, where that is one of `experts`.
    A weight that something else reads as well (a tied embedding) keeps its own values there."""
    graph = graph.copy()
    for node in graph.fx.nodes:
        if node.target is torch.ops.ingot.moe.default and not node.args[9] and not node.args[10]:
            for name in (node.args[3].name, node.args[5].name):
                weight = graph.weights.get(name)
                chosen = choose(weight.recipe.sources[0], False) if weight is not None and weight.recipe.op == "tensor" else None
                if weight is not None and chosen is not None and chosen[0] in experts:
                    graph.weights[name] = replace(weight, recipe=quantized_experts(weight, chosen[0]))
    for node in list(graph.fx.nodes):
        if node.target not in _PRODUCTS or node.args[1].name not in graph.weights:
            continue
        name, weight = node.args[1].name, graph.weights[node.args[1].name]
        is_head = graph.dim(node.args[0].meta["val"].shape[0]) == {"R": 1}
        chosen = choose(weight.recipe.sources[0], is_head) if weight.recipe.op == "tensor" else None
        if chosen is None:
            continue
        quantized = replace(weight, recipe=quantized_recipe(weight, *chosen))
        if all(user.target in _PRODUCTS and user.args[1] is node.args[1] for user in node.args[1].users):
            graph.weights[name] = quantized
        else:
            node.update_arg(1, graph.add_weight(f"{name}_of_linear", quantized))
    return graph


def quantized_recipe(weight: Weight, form: str, activation: str) -> Recipe:
    """A weight, rounded to a format and back."""
    n, k = weight.shape
    found = formats.get(form)
    scales = found.quantize(torch.empty(weight.shape, dtype=weight.dtype, device="meta"))["scale"].dtype
    parts = [Recipe("quantize", (form, part), (weight.recipe,)) for part in found.parts]
    if activation.endswith("_static"):
        block = weight.recipe.sources[0].removesuffix(".weight").rpartition(".")[0]  # those that read the same rows have the same scale
        parts.append(Recipe("tensor", (f"{block}.input_scale",)))
    return Recipe("dequantize", (form, activation, str(scales).removeprefix("torch."), n, k), tuple(parts))


def quantized_experts(weight: Weight, form: str) -> Recipe:
    """A weight [X, N, K], each expert's matrix rounded to a format and back."""
    x, n, k = weight.shape
    tall = Weight(Recipe("reshape", (x * n, k), (weight.recipe,)), weight.dtype, (x * n, k))
    return Recipe("reshape", (x, n, k), (quantized_recipe(tall, form, "none"),))


def layers(graph: Graph) -> list[dict[str, Any]]:
    """Every weight that rows are multiplied by: its product's node, the placeholder of its codes, its format (or dtype), how rows are rounded, and bytes.

    The bytes of a linear are those of all that it reads beside x, those of experts are of the one of their two products.
    """
    found = []
    for node in graph.fx.nodes:
        spec = op_of(node)
        if spec is None or not ("linear" in spec.name or "moe" in spec.name):
            continue
        given = dict(zip(spec.arguments, node.args, strict=False))
        for name in ("weight", "w_in", "w_out"):
            weight = given.get(name)
            if weight is None or weight.name not in graph.weights:
                continue
            side = name.removeprefix("w")  # of experts: _in, _out
            read = [a for n, a in given.items() if isinstance(a, fx.Node) and a.name in graph.weights and (name == "weight" or n.endswith(side))]
            found.append({
                "node": node.name,
                "codes": weight.name,
                "weight": re.sub(rf"_{given['layout']}(_halves)?_weight$", "", weight.name) if "layout" in given else weight.name,
                "format": given.get("format") or str(weight.meta["val"].dtype).removeprefix("torch."),
                "activation": given.get("activation", "none"),
                "bytes": sum(graph.weights[w.name].dtype.itemsize * math.prod(graph.weights[w.name].shape) for w in dict.fromkeys(read)),
            })  # fmt: skip
    return found


def dequantized(graph: Graph) -> dict[str, str]:
    """Weights that a checkpoint has quantized and no kernel reads so, and why: they are floats in the artifact."""

    def ops(recipe: Recipe) -> set[str]:
        return {recipe.op}.union(*map(ops, recipe.inputs))

    made = {name: ops(w.recipe) for name, w in graph.weights.items()}
    ordered = "the columns of experts are in act order (desc_act)"
    return {name: ordered if "argsort" in found else "no kernel reads it otherwise" for name, found in made.items() if "dequantize" in found}


def num_elements(weight: Weight) -> int:
    """How many parameters a weight holds; scales are none."""
    if weight.recipe.reshaped.op != "pack":
        return math.prod(weight.shape)
    _, _, part, n, k, _ = weight.recipe.reshaped.params
    return n * k if part == "weight" else 0
