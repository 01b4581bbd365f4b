"""What each op of a traced graph is in ONNX: aten's here, the dialect's that need no attention; `batch.py` has the rest.

A lowering gets the graph that is written, the fx node, and its arguments with values in the place of nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import fx

from .writer import OnnxError, OnnxGraph, Value

Lowering = Callable[..., Any]
LOWERINGS: dict[str, Lowering] = {}
"""By the op's name as a graph prints it."""
KINDS = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT64, torch.bool: TensorProto.BOOL}


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Register a lowering for ops."""

    def register(lowering: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(names, lowering))
        return lowering

    return register


def _unary(op: str) -> Lowering:
    return lambda g, node, x, **others: g.node(op, x)


for _aten, _op in (("relu", "Relu"), ("tanh", "Tanh"), ("cos", "Cos"), ("sin", "Sin"), ("sigmoid", "Sigmoid"), ("neg", "Neg"), ("exp", "Exp"),
                   ("sqrt", "Sqrt"), ("erf", "Erf"), ("abs", "Abs"), ("log", "Log"), ("reciprocal", "Reciprocal")):  # fmt: skip
    LOWERINGS[f"aten.{_aten}"] = _unary(_op)


def _binary(op: str) -> Lowering:
    def lower(g: OnnxGraph, node: fx.Node, a: Any, b: Any, alpha: float = 1) -> Any:
        dtype = node.meta["val"].dtype
        a, b = (_as(g, x, i, dtype) for x, i in ((a, node.args[0]), (b, node.args[1])))
        return g.node(op, a, b if alpha == 1 else g.node("Mul", b, g.scalar(alpha, dtype)))

    return lower


def _as(g: OnnxGraph, x: Any, given: Any, dtype: torch.dtype) -> Value:
    """An operand in the result's dtype: a number, or a value that arithmetic would promote."""
    if not isinstance(x, Value):
        return g.scalar(x, dtype)
    return x if KINDS[given.meta["val"].dtype] == KINDS[dtype] else g.node("Cast", x, to=KINDS[dtype])


for _aten, _op in (("add", "Add"), ("sub", "Sub"), ("mul", "Mul"), ("div", "Div")):
    LOWERINGS[f"aten.{_aten}.Tensor"] = LOWERINGS[f"aten.{_aten}.Scalar"] = _binary(_op)


@lowers("aten.pow.Tensor_Scalar")
def _pow(g: OnnxGraph, node: fx.Node, x: Value, exponent: float) -> Any:
    return g.node("Pow", x, g.scalar(exponent, torch.float32))


@lowers("aten.rsqrt")
def _rsqrt(g: OnnxGraph, node: fx.Node, x: Value) -> Any:
    return g.node("Reciprocal", g.node("Sqrt", x))


@lowers("aten.silu")
def _silu(g: OnnxGraph, node: fx.Node, x: Value) -> Any:
    return g.node("Mul", x, g.node("Sigmoid", x))


@lowers("aten.gelu")
def _gelu(g: OnnxGraph, node: fx.Node, x: Value, approximate: str = "none") -> Any:
    return g.node("Gelu", x, approximate=approximate)


@lowers("aten.softmax.int", "aten._softmax")
def _softmax(g: OnnxGraph, node: fx.Node, x: Value, dim: int, *others: Any) -> Any:
    return g.node("Softmax", x, axis=dim)


@lowers("aten.mean.dim", "aten.sum.dim_IntList")
def _reduce(g: OnnxGraph, node: fx.Node, x: Value, dims: list[int], keepdim: bool = False) -> Any:
    return g.node("ReduceMean" if "mean" in str(node.target) else "ReduceSum", x, g.ints(*dims), keepdims=int(keepdim))


@lowers("aten.layer_norm")
def _layer_norm(g: OnnxGraph, node: fx.Node, x: Value, shape: list[int], weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5,
                *others: Any) -> Any:  # fmt: skip
    weight = g.constant(np.ones(shape, np.float32)) if weight is None else weight
    return g.node("LayerNormalization", x, weight, *([] if bias is None else [bias]), axis=-len(shape), epsilon=eps)


@lowers("aten.addmm")
def _addmm(g: OnnxGraph, node: fx.Node, bias: Value, x: Value, weight: Value) -> Any:
    return g.node("Gemm", x, weight, bias)


@lowers("aten.matmul")
def _matmul(g: OnnxGraph, node: fx.Node, a: Value, b: Value) -> Any:
    return g.node("MatMul", a, b)


@lowers("aten.reshape")
def _reshape(g: OnnxGraph, node: fx.Node, x: Value, sizes: list[int]) -> Any:
    return g.node("Reshape", x, g.ints(*_known(node, sizes)))


@lowers("aten.expand")
def _expand(g: OnnxGraph, node: fx.Node, x: Value, sizes: list[int]) -> Any:
    return g.node("Expand", x, g.ints(*(1 if s == -1 else s for s in _known(node, sizes))))


def _known(node: fx.Node, sizes: list[Any]) -> list[int]:
    if not all(isinstance(s, int) for s in sizes):
        raise OnnxError(f"{node.name}: {node.target} to a size that is computed has no ONNX form here")
    return sizes


@lowers("aten.transpose.int", "aten.permute")
def _permute(g: OnnxGraph, node: fx.Node, x: Value, *dims: Any) -> Any:
    rank = node.meta["val"].dim()
    if len(dims) == 1:
        order = [d % rank for d in dims[0]]
    else:
        order = list(range(rank))
        a, b = (d % rank for d in dims)
        order[a], order[b] = order[b], order[a]
    return g.node("Transpose", x, perm=order)


@lowers("aten.unsqueeze")
def _unsqueeze(g: OnnxGraph, node: fx.Node, x: Value, dim: int) -> Any:
    return g.node("Unsqueeze", x, g.ints(dim))


@lowers("aten.squeeze.dim")
def _squeeze(g: OnnxGraph, node: fx.Node, x: Value, dim: int) -> Any:
    return g.node("Squeeze", x, g.ints(dim))


@lowers("aten.cat")
def _cat(g: OnnxGraph, node: fx.Node, parts: list[Value], dim: int = 0) -> Any:
    return g.node("Concat", *parts, axis=dim)


@lowers("aten.slice.Tensor")
def _slice(g: OnnxGraph, node: fx.Node, x: Value, dim: int = 0, begin: int | None = None, end: int | None = None, step: int = 1) -> Any:
    _known(node, [v for v in (begin, end) if v is not None])
    return columns(g, x, begin or 0, (1 << 62) if end is None else end, step, axis=dim)


@lowers("aten.select.int")
def _select(g: OnnxGraph, node: fx.Node, x: Value, dim: int, index: int) -> Any:
    return g.node("Gather", x, g.constant(np.array(index, np.int64)), axis=dim)


@lowers("aten.split.Tensor", "aten.split_with_sizes", "aten.split.sizes", "aten.chunk", "aten.unbind.int")
def _split(g: OnnxGraph, node: fx.Node, x: Value, *others: Any) -> Any:
    parts = node.meta["val"]
    unbinds = "unbind" in str(node.target)
    dim = others[0] if unbinds and others else others[1] if len(others) > 1 else 0
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    sizes = [1 if unbinds else p.shape[dim % rank] for p in parts]
    outputs = g.node("Split", x, g.ints(*_known(node, sizes)), num_outputs=len(parts), axis=dim % rank)
    return tuple(g.node("Squeeze", o, g.ints(dim % rank)) for o in outputs) if unbinds else outputs


@lowers("aten.repeat_interleave.self_int")
def _repeat_interleave(g: OnnxGraph, node: fx.Node, x: Value, repeats: int, dim: int, **others: Any) -> Any:
    if dim not in (-1, node.meta["val"].dim() - 1) or repeats != 2:
        raise OnnxError(f"{node.name}: {node.target} along dim {dim}, {repeats} times, has no ONNX form here")
    return twice(g, x, int(node.meta["val"].shape[-1]), node.meta["val"].dim())


@lowers("aten.to.dtype")
def _cast(g: OnnxGraph, node: fx.Node, x: Value, dtype: torch.dtype, *others: Any) -> Any:
    return g.node("Cast", x, to=KINDS[dtype])


@lowers("aten.zeros")
def _zeros(g: OnnxGraph, node: fx.Node, sizes: list[int], dtype: torch.dtype = torch.float32, **others: Any) -> Any:
    return g.constant(np.zeros(_known(node, sizes), np.float32 if dtype.is_floating_point else np.int64))


@lowers("aten.where.self")
def _where(g: OnnxGraph, node: fx.Node, condition: Value, a: Value, b: Value) -> Any:
    return g.node("Where", condition, a, b)


@lowers("getitem")
def _getitem(g: OnnxGraph, node: fx.Node, values: tuple[Value, ...], index: int) -> Any:
    return values[index]


@lowers("ingot.linear")
def _linear(g: OnnxGraph, node: fx.Node, x: Value, weight: Value, bias: Value | None) -> Any:
    if node.meta["val"].dim() == 2:
        return g.node("Gemm", x, weight, *([] if bias is None else [bias]), transB=1)
    y = g.node("MatMul", x, g.node("Transpose", weight, perm=[1, 0]))
    return y if bias is None else g.node("Add", y, bias)


@lowers("ingot.embedding")
def _embedding(g: OnnxGraph, node: fx.Node, ids: Value, weight: Value) -> Any:
    return g.node("Gather", weight, ids, axis=0)


@lowers("ingot.rms_norm")
def _rms_norm(g: OnnxGraph, node: fx.Node, x: Value, weight: Value | None, eps: float, offset: float = 0.0) -> Any:
    mean = g.node("ReduceMean", g.node("Mul", x, x), g.ints(-1), keepdims=1)
    y = g.node("Div", x, g.node("Sqrt", g.node("Add", mean, g.scalar(eps, torch.float32))))
    if weight is None:
        return y
    return g.node("Mul", y, weight if offset == 0 else g.node("Add", weight, g.scalar(offset, torch.float32)))


@lowers("ingot.rotary_embedding")
def _rotary_embedding(g: OnnxGraph, node: fx.Node, positions: Value, inv_freq: Value, scaling: float, half: bool) -> Any:
    column = g.node("Unsqueeze", g.node("Cast", positions, to=TensorProto.FLOAT), g.ints(1))
    angles = g.node("Mul", column, g.node("Unsqueeze", inv_freq, g.ints(0)))
    angles = angles if half else g.node("Concat", angles, angles, axis=-1)
    return tuple(g.node("Mul", g.node(op, angles), g.scalar(scaling, torch.float32)) for op in ("Cos", "Sin"))


@lowers("ingot.rope")
def _rope(g: OnnxGraph, node: fx.Node, x: Value, cos: Value, sin: Value, style: str) -> Any:
    """As `ops.rotary.rope` computes it."""
    base, half = style.removesuffix("_half"), style.endswith("_half")
    table = int(node.args[1].meta["val"].shape[-1])  # type: ignore[union-attr]
    width, size = table * (2 if half else 1), int(node.meta["val"].shape[-1])
    h = x if width == size else columns(g, x, 0, width)
    if base == "gptj_dup":
        cos, sin = (twice(g, columns(g, t, 0, width // 2), width) for t in (cos, sin))
    elif half:
        cos, sin = (twice(g, t, width) if base == "gptj" else g.node("Concat", t, t, axis=-1) for t in (cos, sin))
    c, s = (g.node("Unsqueeze", t, g.ints(1)) for t in (cos, sin))
    if base.startswith("gptj"):
        pair = [g.node("Unsqueeze", t, g.ints(-1)) for t in (g.node("Neg", columns(g, h, 1, width, 2)), columns(g, h, 0, width, 2))]
        turned = g.node("Reshape", g.node("Concat", *pair, axis=-1), g.ints(0, 0, width))
    else:
        if base == "dsv3":
            h = g.node("Concat", columns(g, h, 0, width, 2), columns(g, h, 1, width, 2), axis=-1)
        turned = g.node("Concat", g.node("Neg", columns(g, h, width // 2, width)), columns(g, h, 0, width // 2), axis=-1)
    y = g.node("Add", g.node("Mul", h, c), g.node("Mul", turned, s))
    return y if width == size else g.node("Concat", y, columns(g, x, width, size), axis=-1)


def columns(g: OnnxGraph, x: Value, begin: int, end: int, step: int = 1, axis: int = -1) -> Any:
    """x[..., begin:end:step]."""
    return g.node("Slice", x, g.ints(begin), g.ints(end), g.ints(axis), g.ints(step))


def twice(g: OnnxGraph, x: Value, width: int, rank: int = 2) -> Any:
    """Each element of the last dim two times in a row; `width` is the result's last dim, of `rank`."""
    column = g.node("Unsqueeze", x, g.ints(-1))
    return g.node("Reshape", g.node("Concat", column, column, axis=-1), g.ints(*(0,) * (rank - 1), width))
