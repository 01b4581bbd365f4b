"""What the parts of an ONNX graph mean that are not the network itself: positions and types of tokens, masks, attention.

Exporters write these in many ways, so they are told by what they compute: the part of the graph is evaluated on a small
batch with padding, and must come out as one of the things that a packed step knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from .file import OnnxFile, OnnxFileError, attributes

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_LENGTH, _PADDED = 400, 3
"""Of the text on which masks are evaluated, longer than a window; it ends with padding."""
_HIDDEN = -1e4


@dataclass(frozen=True)
class Index:
    """What chooses rows of a table. `kind`: "ids", "types" or "positions", which begin at `offset`; `padding`: the id that has no position, or −1."""

    kind: str
    shape: tuple[int, ...]  # of the array for a batch of one: 1, and −1 where its tokens are
    offset: int = 0
    padding: int = -1


@dataclass(frozen=True)
class Attention:
    """softmax(scale · q kᵀ + mask) v, by the names of q [B, H, S, E], kᵀ [B, H, E, S] and v [B, H, S, F]; `output` is what it is called in the graph.

    `mask`: the node that applies one, its name, and whether what it is true of is hidden.
    """

    node: onnx.NodeProto
    output: str
    q: str
    k_t: str
    v: str
    scale: float
    mask: tuple[onnx.NodeProto, str, bool] | None


def feeds(file: OnnxFile, length: int, batch: int = 2, padded: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs; each text ends with `padded` tokens of padding."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int64)
    mask[:, length - padded :] = 0
    every = {
        "input_ids": rng.integers(5, 90, (batch, length)),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, (batch, length)),
        "position_ids": np.tile(np.arange(length), (batch, 1)),
    }
    kinds = {i.name: i.type.tensor_type.elem_type for i in file.model.graph.input}
    return {n: v.astype(onnx.helper.tensor_dtype_to_np_dtype(kinds[n])) for n, v in every.items() if n in file.inputs}


def counts_tokens(file: OnnxFile, name: str) -> bool:
    """Whether a value has a number for each token, or each token of a text, and comes from the inputs alone."""
    if name in file.inputs or not file.is_side(name) or file.asks_shapes(name) or file.constant_type(name) is not None:
        return name in file.inputs
    return [file.evaluate(name, feeds(file, n)).size in (n, 2 * n) for n in (7, 12)] == [True, True]


def index(file: OnnxFile, node: onnx.NodeProto, name: str) -> Index:
    """What the value `name`, by which `node` chooses rows of a table, is. OnnxFileError when it is nothing that is known."""
    if not file.is_side(name):
        raise file.error(node, "chooses rows by numbers that the network computes")
    seen = []
    shape: tuple[int, ...] = (1, -1)
    for length, seed in ((7, 1), (12, 2)):
        given = feeds(file, length, seed=seed)
        value = file.evaluate(name, given)
        if value.size not in (length, 2 * length):
            raise file.error(node, f"chooses rows by numbers of shape {list(value.shape)} for a batch of 2 × {length} tokens")
        shape = tuple(-1 if n in (length, 2 * length) else 1 for n in value.shape)
        seen.append((given, np.broadcast_to(value.reshape(-1, length), (2, length))))
    if all(np.array_equal(value, given["input_ids"]) for given, value in seen):
        return Index("ids", shape)
    if all(np.array_equal(value, given.get("token_type_ids", np.zeros_like(value))) for given, value in seen):
        return Index("types", shape)
    offset = int(seen[0][1][0, 0])
    if all(np.array_equal(value, np.tile(np.arange(value.shape[1]) + offset, (2, 1))) for _, value in seen):
        return Index("positions", shape, offset, _padding(file, name, offset))
    raise file.error(node, "chooses rows by something that is neither the ids, types nor positions of tokens")


def _padding(file: OnnxFile, name: str, offset: int) -> int:
    """RoBERTa counts positions from the padding's id + 1 on and skips padding."""
    given = feeds(file, 7)
    if offset == 0 or "input_ids" not in given:
        return -1
    given["input_ids"][:, 2] = offset - 1
    value = np.broadcast_to(file.evaluate(name, given).reshape(-1, 7), (2, 7))
    return -1 if np.array_equal(value, np.tile(np.arange(7) + offset, (2, 1))) else offset - 1


def attentions(file: OnnxFile) -> dict[str, Attention]:
    """Every softmax(q kᵀ) v of the graph, by the name of its result. OnnxFileError for a Softmax that is none."""
    found = [_attention(file, node) for node in file.nodes if node.op_type == "Softmax"]
    return {a.output: a for a in found}


def _attention(file: OnnxFile, softmax: onnx.NodeProto) -> Attention:
    if attributes(softmax).get("axis", -1) not in (-1, 3):
        raise file.error(softmax, "is over another dim than the last, and in an encoder only attention mixes tokens")
    product = _product_with_values(file, softmax)
    value, scale = softmax.input[0], 1.0
    mask: tuple[onnx.NodeProto, str, bool] | None = None
    while (node := _producer(file, softmax, value)).op_type != "MatMul":
        if node.op_type in ("Cast", "Identity"):
            value = node.input[0]
        elif node.op_type in ("Mul", "Div") and (factor := _scalar(file, node.input[1])) is not None:
            value, scale = node.input[0], scale * (factor if node.op_type == "Mul" else 1 / factor)
        elif node.op_type == "Mul" and (factor := _scalar(file, node.input[0])) is not None:
            value, scale = node.input[1], scale * factor
        elif node.op_type in ("Add", "Where") and scale == 1.0 and mask is None:
            value, name = _masked(file, node)
            mask = node, name, node.op_type == "Where" and value == node.input[2]
        else:
            raise file.error(softmax, f"takes scores from {node.name or node.op_type}, which is not part of attention as it is known")
    return Attention(softmax, product.output[0], node.input[0], node.input[1], product.input[1], scale, mask)


def _producer(file: OnnxFile, softmax: onnx.NodeProto, value: str) -> onnx.NodeProto:
    node = file.producers.get(value)
    if node is None:
        raise file.error(softmax, "is not over a product of queries and keys")
    return node


def _product_with_values(file: OnnxFile, softmax: onnx.NodeProto) -> onnx.NodeProto:
    """The product that probabilities go to. A guard that makes 0 of NaN changes nothing where every token sees itself."""
    value = softmax.output[0]
    while True:
        users = file.users.get(value, [])
        guard = next((n for n in users if n.op_type == "Where"), None)
        if guard is not None and {n.op_type for n in users} == {"IsNaN", "Where"} and guard.input[2] == value:
            value = guard.output[0]
        elif len(users) == 1 and users[0].op_type in ("Cast", "Identity", "Dropout"):
            value = users[0].output[0]
        elif len(users) == 1 and users[0].op_type == "MatMul" and users[0].input[0] == value:
            return users[0]
        else:
            raise file.error(softmax, "does not go on to a product with values, and in an encoder only attention mixes tokens")


def _masked(file: OnnxFile, node: onnx.NodeProto) -> tuple[str, str]:
    """(scores, mask) of scores + mask, or of Where(mask, …)."""
    if node.op_type == "Where":
        chosen = [i for i in (1, 2) if not file.is_side(node.input[i])]
        if len(chosen) == 1 and file.is_side(node.input[0]):
            return node.input[chosen[0]], node.input[0]
    else:
        sides = [file.is_side(i) for i in node.input]
        if sides.count(True) == 1:
            return node.input[sides.index(False)], node.input[sides.index(True)]
    raise file.error(node, "adds to the scores of attention something that is no mask")


def window(file: OnnxFile, node: onnx.NodeProto, mask: str, hides: bool, shape: Callable[[str, int], Sequence[int]]) -> int:
    """0 when a mask hides padding alone, w when it also hides what is w or more positions away. OnnxFileError when it is another one.

    `shape` tells that of a value which the network computes, for a batch of one text of so many tokens.
    """
    value = file.evaluate(mask, feeds(file, _LENGTH, 1, _PADDED), lambda name: shape(name, _LENGTH))
    if value.dtype == bool:
        seen, exact = value != hides, True
    else:
        seen = value > _HIDDEN
        exact = bool((np.abs(value[seen]) < 1e-6).all())
    try:
        seen = np.broadcast_to(seen, (*seen.shape[:-2], _LENGTH, _LENGTH)).reshape(-1, _LENGTH, _LENGTH)
    except ValueError:
        exact = False
    if exact:
        there = _LENGTH - _PADDED
        width = int(seen[0, 0].sum())
        distance = np.abs(np.arange(there)[:, None] - np.arange(_LENGTH))
        expected = (distance < width) & (np.arange(_LENGTH) < there)
        if (seen[:, :there] == expected).all():
            return 0 if width == there else width
    raise file.error(node, f"hides from attention something else than padding and what is far away ({mask})")


def _scalar(file: OnnxFile, name: str) -> float | None:
    array: Any = file.constant(name)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def check_inputs(file: OnnxFile) -> None:
    """OnnxFileError unless the inputs are those of an encoder."""
    if "input_ids" not in file.inputs or set(file.inputs) - set(INPUTS):
        names = ", ".join(file.inputs) or "none"
        raise OnnxFileError(f"{file.path} has the inputs {names}; an encoder of texts has input_ids, and may have {', '.join(INPUTS[1:])}")
