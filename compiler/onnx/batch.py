"""From packed steps to the batches of ONNX: a [B, S] batch is a step of B · S tokens, and attention alone knows rows.

Every op of an admitted graph but attention and pooling works token by token, so it stands as it is on [B · S, …]. An encoder
takes `input_ids` and `attention_mask` [B, S]. A decoder also takes `position_ids` [B, S] and its past keys and values
[B, K, P, E], which it returns with the new ones behind them (`attention_mask` [B, P + S] covers both): the signature that
Optimum gives exported decoders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import fx

from ingot.artifacts.manifest import Embedding
from ingot.ops import Graph

from .writer import OnnxError, OnnxGraph, Value

_BATCH, _SEQUENCE, _PAST = "batch", "sequence", "past"
_HIDDEN = float(np.finfo(np.float32).min)  # as a bias: finite, so that a row which sees nothing is not NaN


@dataclass
class Batch:
    """The inputs of one of the two signatures, and the lowerings of the ops that are about sequences."""

    g: OnnxGraph
    graph: Graph
    ids: Value = field(init=False)
    mask: Value = field(init=False)
    past: dict[str, Value] = field(default_factory=dict)
    presents: dict[str, Value] = field(default_factory=dict)
    biases: dict[tuple[int, bool], Value] = field(default_factory=dict)

    def placeholders(self) -> dict[str, Any]:
        """Values of the step inputs and states; those that only attention reads are None."""
        g, decodes = self.g, self.graph.entry_point == "forward"
        self.ids = g.input("input_ids", TensorProto.INT64, [_BATCH, _SEQUENCE])
        self.mask = g.input("attention_mask", TensorProto.INT64, [_BATCH, f"{_PAST} + {_SEQUENCE}" if decodes else _SEQUENCE])
        values: dict[str, Any] = dict.fromkeys(self.graph.inputs)
        values["input_ids"] = g.node("Reshape", self.ids, g.ints(-1))
        if decodes:
            values["positions"] = g.node("Reshape", g.input("position_ids", TensorProto.INT64, [_BATCH, _SEQUENCE]), g.ints(-1))
        else:
            positions = g.node("Expand", self._range(self._size(self.ids, 1)), g.node("Shape", self.ids))
            values["positions"] = g.node("Reshape", positions, g.ints(-1))
        for name, state in self.graph.states.items():
            kind, _, number = name.rpartition("_cache_")
            if state.kind != "page" or kind not in ("k", "v"):
                raise OnnxError(f"the state {name} has no ONNX form here: keys and values of attention do, recurrent and quantized states do not")
            heads, _, size = state.shape
            past = f"past_key_values.{number}.{'key' if kind == 'k' else 'value'}"
            self.past[name] = g.input(past, TensorProto.FLOAT, [_BATCH, heads, _PAST, size])
            values[name] = Value(name)
        return values

    def results(self, values: dict[fx.Node, Any], embedding: Embedding | None) -> None:
        """Declare the outputs."""
        result = self.graph.fx.output_node().args[0][0]  # type: ignore[index]
        width = int(result.meta["val"].shape[-1])
        if self.graph.entry_point == "forward":
            self.g.output("logits", self._unflatten(values[result], width), [_BATCH, _SEQUENCE, width])
            for name, value in self.presents.items():
                heads, _, size = self.graph.states[name].shape
                output = re.sub(r"^past_key_values", "present", self.past[name])
                self.g.output(output, value, [_BATCH, heads, f"{_PAST} + {_SEQUENCE}", size])
            return
        assert embedding is not None
        hidden = self._unflatten(values[result.args[0]], width)
        self.g.output("last_hidden_state", hidden, [_BATCH, _SEQUENCE, width])
        self.g.output("sentence_embedding", self._pooled(hidden, embedding), [_BATCH, width])

    def packed_attention(self, g: OnnxGraph, node: fx.Node, q: Value, k: Value, v: Value, starts: None, scale: float, window: int = 0) -> Value:
        return self._attend(node, q, self._heads(k, node.args[1]), self._heads(v, node.args[2]), scale, window, causal=False)

    def kv_write(self, g: OnnxGraph, node: fx.Node, k: Value, v: Value, k_cache: Value, v_cache: Value, slots: None, *scales: Any) -> tuple[Value, ...]:
        """The new state is past and new keys (values) together, which is also what the model returns."""
        if any(s is not None for s in scales):
            raise OnnxError(f"{node.name}: a quantized KV cache has no ONNX form here")
        for name, new, given in ((k_cache, k, node.args[0]), (v_cache, v, node.args[1])):
            self.presents[name] = g.node("Concat", self.past[name], self._heads(new, given), axis=2)
        return k_cache, v_cache

    def paged_attention(self, g: OnnxGraph, node: fx.Node, q: Value, k_cache: Value, v_cache: Value, starts: None, lengths: None, table: None,
                        sinks: Value | None, alibi: Value | None, scale: float, window: int = 0, chunk: int = 0, softcap: float = 0.0,
                        *scales: Any) -> Value:  # fmt: skip
        given = {"sinks": sinks, "alibi_slopes": alibi, "chunk": chunk or None, "k_scale": next((s for s in scales if s is not None), None)}
        if unknown := [n for n, value in given.items() if value is not None]:
            raise OnnxError(f"{node.name}: paged_attention with {', '.join(unknown)} has no ONNX form here")
        return self._attend(node, q, self.presents[k_cache], self.presents[v_cache], scale, window, causal=True, softcap=softcap)

    def gather_rows(self, g: OnnxGraph, node: fx.Node, x: Value, rows: None) -> Value:
        """Logits of every token."""
        return x

    def pool(self, g: OnnxGraph, node: fx.Node, x: Value, starts: None, pooling: None) -> Value:
        return x  # `results` pools what has been shaped again

    def _attend(self, node: fx.Node, q: Value, k: Value, v: Value, scale: float, window: int, causal: bool, softcap: float = 0.0) -> Value:
        """q [T, H, E], k [B, K, L, E], v [B, K, L, F] → [T, H, F]."""
        g = self.g
        heads, size = (int(n) for n in node.args[0].meta["val"].shape[1:])  # type: ignore[union-attr]
        if causal:
            kv_heads = self.graph.states[self._state(node)].shape[0]
        else:
            kv_heads = int(node.args[1].meta["val"].shape[1])  # type: ignore[union-attr]
        q, bias = self._heads(q, node.args[0]), self._bias(window, causal)
        order = [0, 1, 3, 2]
        if heads != kv_heads:  # query heads of one kv head are a dim of their own, over which keys broadcast
            q = g.node("Reshape", q, g.constant(np.array([0, kv_heads, heads // kv_heads, -1, size])))
            k, v, bias = (g.node("Unsqueeze", t, g.ints(2)) for t in (k, v, bias))
            order = [0, 1, 2, 4, 3]
        scores = g.node("Mul", g.node("MatMul", q, g.node("Transpose", k, perm=order)), g.scalar(scale, torch.float32))
        if softcap:
            cap = g.scalar(softcap, torch.float32)
            scores = g.node("Mul", g.node("Tanh", g.node("Div", scores, cap)), cap)
        y = g.node("MatMul", g.node("Softmax", g.node("Add", scores, bias), axis=-1), v)
        width = int(node.meta["val"].shape[2])
        if heads != kv_heads:
            y = g.node("Reshape", y, g.ints(0, heads, -1, width))
        rows: Value = g.node("Reshape", g.node("Transpose", y, perm=[0, 2, 1, 3]), g.ints(-1, heads, width))
        return rows

    def _state(self, node: fx.Node) -> str:
        """The name of the k cache that an attention reads a version of."""
        source: Any = node.args[1]
        while source.op != "placeholder":
            source = source.args[0] if source.target is not torch.ops.ingot.kv_write.default else source.args[2]
        return str(source.name)

    def _bias(self, window: int, causal: bool) -> Value:
        """[B, 1, S, L]: 0 where a token sees another, hugely negative elsewhere."""
        if (window, causal) not in self.biases:
            g = self.g
            length, sequence = self._size(self.mask, 1), self._size(self.ids, 1)
            key = self._range(length)
            query = g.node("Unsqueeze", g.node("Add", self._range(sequence), g.node("Sub", length, sequence)), g.ints(1))
            seen = g.node("Cast", g.node("Unsqueeze", self.mask, g.ints(1, 2)), to=TensorProto.BOOL)
            distance = g.node("Sub", query, key)
            limits = ([("GreaterOrEqual", distance, 0)] if causal else []) + (
                [("Less", distance if causal else g.node("Abs", distance), window)] * bool(window)
            )
            for op, value, limit in limits:
                seen = g.node("And", seen, g.node(op, value, g.scalar(limit, torch.int64)))
            bias = g.node("Where", seen, g.scalar(0.0, torch.float32), g.scalar(_HIDDEN, torch.float32))
            shape = g.node("Concat", self._sizes(self.ids, 0), g.ints(1), self._sizes(self.ids, 1), self._sizes(self.mask, 1), axis=0)
            self.biases[window, causal] = g.node("Expand", bias, shape)
        return self.biases[window, causal]

    def _pooled(self, hidden: Value, embedding: Embedding) -> Value:
        """[B, D] of hidden states [B, S, D]; what `attention_mask` hides is padding on the right."""
        g = self.g
        counted = g.node("Cast", self.mask, to=TensorProto.FLOAT)
        if embedding.pooling == "mean":
            weights = g.node("Unsqueeze", counted, g.ints(2))
            total = g.node("ReduceSum", g.node("Mul", hidden, weights), g.ints(1), keepdims=0)
            pooled = g.node("Div", total, g.node("ReduceSum", counted, g.ints(1), keepdims=1))
        elif embedding.pooling == "cls":
            pooled = g.node("Gather", hidden, g.constant(np.array(0, np.int64)), axis=1)
        else:
            last = g.node("Sub", g.node("ReduceSum", self.mask, g.ints(1), keepdims=1), g.scalar(1, torch.int64))
            pooled = g.node("GatherND", hidden, last, batch_dims=1)
        if embedding.normalize:
            pooled = g.node("Div", pooled, g.node("ReduceL2", pooled, g.ints(1), keepdims=1))
        result: Value = pooled
        return result

    def _heads(self, x: Value, given: Any) -> Value:
        """[T, H, E] → [B, H, S, E]."""
        g = self.g
        shape = g.node("Concat", g.node("Shape", self.ids), g.ints(*(int(n) for n in given.meta["val"].shape[1:])), axis=0)
        heads: Value = g.node("Transpose", g.node("Reshape", x, shape), perm=[0, 2, 1, 3])
        return heads

    def _unflatten(self, x: Value, width: int) -> Value:
        """[T, D] → [B, S, D]."""
        g = self.g
        result: Value = g.node("Reshape", x, g.node("Concat", g.node("Shape", self.ids), g.ints(width), axis=0))
        return result

    def _sizes(self, x: Value, dim: int) -> Value:
        """One size, as a vector."""
        size: Value = self.g.node("Shape", x, start=dim, end=dim + 1)
        return size

    def _size(self, x: Value, dim: int) -> Value:
        size: Value = self.g.node("Squeeze", self._sizes(x, dim), self.g.ints(0))
        return size

    def _range(self, stop: Value) -> Value:
        result: Value = self.g.node("Range", self.g.scalar(0, torch.int64), stop, self.g.scalar(1, torch.int64))
        return result
