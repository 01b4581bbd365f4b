"""ONNX nodes as torch ops on a packed step, which is a batch of one: what the network computes token by token.

Values are tensors, or on the host arrays of numbers and sizes: shapes, axes, and what is computed from them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F

from .file import OnnxFile, attributes
from .meaning import Attention, Index, window

Op = Callable[["Translation", onnx.NodeProto], Any]
OPS: dict[str, Op] = {}


def op(*names: str) -> Callable[[Op], Op]:
    """Register how ONNX ops are computed."""

    def register(function: Op) -> Op:
        OPS.update(dict.fromkeys(names, function))
        return function

    return register


class Translation:
    """One run over the nodes. `step` has the step inputs, `weights` tensors by (constant's name, transposed)."""

    def __init__(self, file: OnnxFile, nodes: list[onnx.NodeProto], attentions: dict[str, Attention], indices: dict[str, Index],
                 biases: dict[str, onnx.NodeProto]) -> None:  # fmt: skip
        self.file, self.nodes, self.attentions, self.indices = file, nodes, attentions, indices
        self.biases = biases  # result of a product → the Add of its bias, which computes both
        self.step: dict[str, torch.Tensor] = {}
        self.weights: dict[tuple[str, bool], torch.Tensor] = {}
        self.values: dict[str, Any] = {}
        self.windows: dict[tuple[str, bool], int] = {}

    def run(self, step: dict[str, torch.Tensor], weights: dict[tuple[str, bool], torch.Tensor], output: str) -> torch.Tensor:
        """The value `output`, [1, T, D] or [T, D]."""
        self.step, self.weights = step, weights
        self.values = {i: step["input_ids"].unsqueeze(0) for i in self.file.inputs}  # of the others, only the shape is asked here
        for node in self.nodes:
            if node.output[0] in self.attentions:
                self.values[node.output[0]] = self._attend(self.attentions[node.output[0]])
            elif node.output[0] not in self.biases:
                try:
                    self._set(node, OPS[node.op_type](self, node))
                except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as e:  # what torch and numpy raise on shapes that do not fit
                    raise self.file.error(node, f"cannot be computed on a packed step: {str(e).splitlines()[0] or type(e).__name__}") from e
        result: torch.Tensor = self.values[output]
        return result

    def _set(self, node: onnx.NodeProto, result: Any) -> None:
        self.values.update(zip(node.output, result if isinstance(result, tuple) else (result,), strict=False))

    def _attend(self, a: Attention) -> torch.Tensor:
        q, k_t, v = (self.get(n) for n in (a.q, a.k_t, a.v))
        if not all(t.dim() == 4 and t.shape[0] == 1 for t in (q, k_t, v)):
            raise self.file.error(a.node, f"is attention over tensors of shape {list(q.shape)}; [batch, heads, tokens, dim] is known")
        rows = [q.squeeze(0).transpose(0, 1), k_t.squeeze(0).permute(2, 0, 1), v.squeeze(0).transpose(0, 1)]
        width = 0
        if a.mask is not None:
            node, mask, hides = a.mask
            if (mask, hides) not in self.windows:
                self.windows[mask, hides] = window(self.file, node, mask, hides, self.shape)
            width = self.windows[mask, hides]
        out: torch.Tensor = torch.ops.ingot.packed_attention(*rows, self.step["cu_seqlens_q"], a.scale, width)
        return out.transpose(0, 1).unsqueeze(0)

    def shape(self, name: str, tokens: int) -> list[int]:
        """The shape of a value that was computed already, in a step of so many tokens."""
        sizes = [s if isinstance(s, int) else s.node.expr for s in self.values[name].shape]
        return [s if isinstance(s, int) else int(s.subs(dict.fromkeys(s.free_symbols, tokens))) for s in sizes]

    def get(self, name: str) -> Any:
        """A value; a constant is an array, a float one with several numbers a weight."""
        if name in self.values:
            return self.values[name]
        if (name, False) in self.weights:
            return self.weights[name, False]
        return self.file.constant(name)

    def positions(self, found: Index) -> torch.Tensor:
        """Positions [T] as the file counts them."""
        return self.step["positions"] + found.offset if found.offset else self.step["positions"]

    def args(self, node: onnx.NodeProto) -> list[Any]:
        """The node's inputs, None where one is left out."""
        return [self.get(n) if n else None for n in node.input]

    def numbers(self, node: onnx.NodeProto, place: int, attribute: str) -> list[Any] | None:
        """Axes and their kind, which older opsets keep in an attribute."""
        given = attributes(node).get(attribute)
        if given is not None:
            return list(given)
        value = self.get(node.input[place]) if len(node.input) > place and node.input[place] else None
        return None if value is None else [v if isinstance(v, torch.SymInt) else int(v) for v in np.asarray(value, object).reshape(-1)]

    def not_over_tokens(self, node: onnx.NodeProto, x: torch.Tensor, axes: list[int]) -> None:
        """An error unless `x` has a size that is known along `axes`."""
        if any(not isinstance(x.shape[a], int) for a in axes):
            raise self.file.error(node, "mixes tokens, and in an encoder only attention does")

    def linear(self, node: onnx.NodeProto, x: torch.Tensor, weight: str, transposed: bool, bias: str | None) -> torch.Tensor:
        """x times a constant, with a bias that comes with the product or in an Add behind it."""
        b = None if bias is None else self.get(bias)
        out: torch.Tensor = torch.ops.ingot.linear(x, self.weights[weight, transposed], b)
        return out


def _host(*values: Any) -> bool:
    return not any(isinstance(v, torch.Tensor) for v in values)


def _number(x: Any) -> Any:
    """An array of one number as the number."""
    return x if isinstance(x, torch.Tensor) else np.asarray(x, object).reshape(-1)[0]


def _binary(function: Callable[[Any, Any], Any], on_host: Callable[[Any, Any], Any] | None = None) -> Op:
    def compute(t: Translation, node: onnx.NodeProto) -> Any:
        a, b = t.args(node)
        if _host(a, b):
            return np.asarray((on_host or function)(np.asarray(a, object), np.asarray(b, object)), object)
        return function(_number(a), _number(b))

    return compute


def _divide(a: Any, b: Any) -> Any:
    return np.frompyfunc(lambda x, y: x / y if isinstance(x, float) or isinstance(y, float) else x // y, 2, 1)(a, b)


for _name, _function in (("Sub", operator.sub), ("Mul", operator.mul), ("Pow", operator.pow)):
    OPS[_name] = _binary(_function)
OPS["Div"] = _binary(operator.truediv, _divide)


@op("Add")
def _add(t: Translation, node: onnx.NodeProto) -> Any:
    for product, bias in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        if t.biases.get(product) is node:
            matmul = t.file.producers[product]
            return t.linear(matmul, t.get(matmul.input[0]), matmul.input[1], True, bias)
    return _binary(operator.add)(t, node)


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Op:
    return lambda t, node: function(t.args(node)[0])


for _name, _pointwise in (("Erf", torch.erf), ("Tanh", torch.tanh), ("Sigmoid", torch.sigmoid), ("Relu", torch.relu), ("Neg", torch.neg), ("Exp", torch.exp),
                          ("Cos", torch.cos), ("Sin", torch.sin), ("Reciprocal", torch.reciprocal), ("Abs", torch.abs)):  # fmt: skip
    OPS[_name] = _unary(_pointwise)


@op("Sqrt")
def _sqrt(t: Translation, node: onnx.NodeProto) -> Any:
    [x] = t.args(node)
    return np.asarray(np.frompyfunc(math.sqrt, 1, 1)(x), object) if _host(x) else torch.sqrt(x)


@op("Gelu")
def _gelu(t: Translation, node: onnx.NodeProto) -> Any:
    return F.gelu(t.args(node)[0], approximate=attributes(node).get("approximate", "none"))


@op("Identity", "Dropout")
def _identity(t: Translation, node: onnx.NodeProto) -> Any:
    return t.args(node)[0]


@op("Cast")
def _cast(t: Translation, node: onnx.NodeProto) -> Any:
    found = t.indices.get(node.input[0])
    if found is not None:
        return t.positions(found).float().reshape(found.shape)
    [x], to = t.args(node), np.dtype(onnx.helper.tensor_dtype_to_np_dtype(attributes(node)["to"]))
    if _host(x):
        return np.asarray(np.frompyfunc(lambda v: v if isinstance(v, torch.SymInt) else float(v) if to.kind == "f" else int(v), 1, 1)(x), object)
    if to.kind != "f":
        raise t.file.error(node, f"casts activations to {to}")
    return x


@op("Constant")
def _constant(t: Translation, node: onnx.NodeProto) -> Any:
    return t.get(node.output[0])


@op("Gather")
def _gather(t: Translation, node: onnx.NodeProto) -> Any:
    table, axis = node.input[0], attributes(node).get("axis", 0)
    found = t.indices.get(node.input[1])
    if found is not None:
        ids = {"ids": lambda: t.step["input_ids"], "types": lambda: torch.zeros(1, dtype=torch.int32), "positions": lambda: t.positions(found)}[found.kind]()
        return F.embedding(ids.reshape(found.shape), t.get(table))
    data, index = t.args(node)
    if isinstance(data, torch.Tensor) and not isinstance(index, torch.Tensor) and not np.any(index) and axis == 0:
        return F.embedding(torch.zeros(index.shape, dtype=torch.int32), data)  # the type of every token
    if not _host(data, index):
        raise t.file.error(node, "chooses among activations by numbers that are computed")
    return np.asarray(np.take(np.asarray(data, object), np.asarray(index, np.int64), axis), object)


@op("MatMul")
def _matmul(t: Translation, node: onnx.NodeProto) -> Any:
    x, weight = node.input
    if (weight, True) not in t.weights:
        a, b = t.args(node)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dim() == b.dim() and a.shape[-1] == 1 and b.shape[-2] == 1:
            return a * b  # frequencies times positions
        raise t.file.error(node, "multiplies activations outside attention, which would mix tokens")
    return t.linear(node, t.get(x), weight, True, None)


@op("Gemm")
def _gemm(t: Translation, node: onnx.NodeProto) -> Any:
    how = attributes(node)
    plain = how.get("alpha", 1.0) == 1.0 and (how.get("beta", 1.0) == 1.0 or len(node.input) < 3) and not how.get("transA", 0)
    transposed = not how.get("transB", 0)
    if not plain or (node.input[1], transposed) not in t.weights:
        raise t.file.error(node, "is not a product of activations with a constant")
    return t.linear(node, t.get(node.input[0]), node.input[1], transposed, node.input[2] if len(node.input) > 2 else None)


@op("LayerNormalization")
def _layer_norm(t: Translation, node: onnx.NodeProto) -> Any:
    x, weight, *bias = t.args(node)
    if attributes(node).get("axis", -1) not in (-1, x.dim() - 1):
        raise t.file.error(node, "normalizes over more than the last dim")
    return F.layer_norm(x, list(weight.shape), weight, bias[0] if bias else None, attributes(node).get("epsilon", 1e-5))


@op("ReduceMean", "ReduceSum")
def _reduce(t: Translation, node: onnx.NodeProto) -> Any:
    x, axes = t.args(node)[0], t.numbers(node, 1, "axes")
    if axes is None:
        raise t.file.error(node, "reduces over every dim, tokens too")
    t.not_over_tokens(node, x, axes)
    return (torch.mean if node.op_type == "ReduceMean" else torch.sum)(x, axes, keepdim=bool(attributes(node).get("keepdims", 1)))


@op("Shape")
def _shape(t: Translation, node: onnx.NodeProto) -> Any:
    x, how = t.args(node)[0], attributes(node)
    return np.array([*x.shape][how.get("start", 0) : how.get("end")], object)


@op("Reshape")
def _reshape(t: Translation, node: onnx.NodeProto) -> Any:
    x, sizes = t.args(node)[0], t.numbers(node, 1, "shape") or []
    if _host(x):
        return np.asarray(x, object).reshape(sizes)
    return x.reshape([x.shape[i] if isinstance(s, int) and s == 0 else s for i, s in enumerate(sizes)])


@op("Transpose")
def _transpose(t: Translation, node: onnx.NodeProto) -> Any:
    x = t.args(node)[0]
    return x.permute(attributes(node).get("perm", list(range(x.dim()))[::-1]))


@op("Unsqueeze")
def _unsqueeze(t: Translation, node: onnx.NodeProto) -> Any:
    x, axes = t.args(node)[0], t.numbers(node, 1, "axes") or []
    if _host(x):
        return np.expand_dims(np.asarray(x, object), tuple(axes))
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@op("Squeeze")
def _squeeze(t: Translation, node: onnx.NodeProto) -> Any:
    x, axes = t.args(node)[0], t.numbers(node, 1, "axes")
    if _host(x):
        return np.squeeze(np.asarray(x, object), None if axes is None else tuple(axes))
    if axes is None:
        raise t.file.error(node, "drops every dim of size 1, whichever these are")
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.squeeze(axis)
    return x


@op("Expand")
def _expand(t: Translation, node: onnx.NodeProto) -> Any:
    x, sizes = t.args(node)[0], t.numbers(node, 1, "shape") or []
    rank = max(x.dim(), len(sizes))
    wanted = [1] * (rank - len(sizes)) + sizes
    return x.expand([-1 if isinstance(s, int) and s == 1 and i >= rank - x.dim() else s for i, s in enumerate(wanted)])


@op("Concat")
def _concat(t: Translation, node: onnx.NodeProto) -> Any:
    parts, axis = t.args(node), attributes(node)["axis"]
    if _host(*parts):
        return np.concatenate([np.asarray(p, object) for p in parts], axis)
    t.not_over_tokens(node, parts[0], [axis])
    return torch.cat(parts, axis)


@op("Split")
def _split(t: Translation, node: onnx.NodeProto) -> Any:
    x, axis = t.args(node)[0], attributes(node).get("axis", 0)
    t.not_over_tokens(node, x, [axis])
    sizes = t.numbers(node, 1, "split") or [x.shape[axis] // len(node.output)] * len(node.output)
    return tuple(x.split(sizes, axis))


@op("Slice")
def _slice(t: Translation, node: onnx.NodeProto) -> Any:
    x = t.args(node)[0]
    starts, ends = t.numbers(node, 1, "starts") or [], t.numbers(node, 2, "ends") or []
    axes, steps = t.numbers(node, 3, "axes") or list(range(len(starts))), t.numbers(node, 4, "steps") or [1] * len(starts)
    for axis, begin, end, step in zip(axes, starts, ends, steps, strict=True):
        piece = slice(begin, end, step)
        if _host(x):
            x = np.asarray(x, object)[(slice(None),) * axis + (piece,)]
            continue
        t.not_over_tokens(node, x, [axis])
        x = x[(slice(None),) * (axis % x.dim()) + (slice(*piece.indices(x.shape[axis])),)]
    return x
