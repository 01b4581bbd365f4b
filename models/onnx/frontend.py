"""From an ONNX file to a Graph: an encoder [batch, sequence] → hidden states, run once over a packed step and recorded."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import onnx
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ingot.ops import Graph, Recipe, Weight

from ..canonical import canonicalize
from ..encoders import pool_sequences
from ..frontend import Sizes, drop_unused, lift_attributes
from ..oracle import TOLERANCE
from ..swaps.context import Context
from ..unbatch import unbatch
from .file import OnnxFile, OnnxFileError
from .meaning import Index, attentions, check_inputs, counts_tokens, feeds, index
from .translate import OPS, Translation

_HIDDEN = ("last_hidden_state", "token_embeddings")
_TEXTS = (5, 1, 8)
"""Lengths of the texts on which a graph is compared with the file."""


class OnnxEncoder:
    """What a file was found to be. OnnxFileError, naming the node, when it is no encoder that can be packed."""

    def __init__(self, file: OnnxFile) -> None:
        check_inputs(file)
        self.file = file
        self.output = _hidden_states(file)
        self.attentions = attentions(file)
        self.indices: dict[str, Index] = {}
        self.nodes = self._needed()
        if unknown := next((n for n in self.nodes if n.op_type not in OPS and n.output[0] not in self.attentions), None):
            raise file.error(unknown, "has no counterpart in the dialect")
        self.weights, self.biases = self._weights()

    @property
    def vocab_size(self) -> int:
        """Rows of the table that ids choose from."""
        return self._rows("ids") or 0

    @property
    def max_positions(self) -> int | None:
        """The most tokens of a text, if there is a table of positions."""
        rows, found = self._rows("positions"), next((i for i in self.indices.values() if i.kind == "positions"), None)
        return None if rows is None or found is None else rows - found.offset

    @property
    def padding_id(self) -> int:
        """The id that has no position; −1: none."""
        return max((i.padding for i in self.indices.values()), default=-1)

    def trace(self) -> Graph:
        """The `embed` graph, float32, its weights recipes over the file's constants; compared with the file before it is given out."""
        sizes = Sizes()
        inputs = Context(1, None, "embed").inputs()
        values = {name: sizes.empty(spec.shape, spec.dtype) for name, spec in inputs.items()}
        tensors = {key: sizes.empty(w.shape, w.dtype) for key, w in self.weights.items()}
        translation = Translation(self.file, self.nodes, self.attentions, self.indices, self.biases)

        def step(*args: torch.Tensor) -> list[torch.Tensor]:
            given = dict(zip(values, args, strict=False))
            hidden = translation.run(given, dict(zip(tensors, args[len(values) :], strict=True)), self.output)
            return [hidden.reshape(-1, hidden.shape[-1])]

        with torch.no_grad(), sizes.mode:
            module = make_fx(step, tracing_mode="real", pre_dispatch=True)(*values.values(), *tensors.values())
        sizes.check_guards(str(self.file.path))
        names = [*values, *(_identifier(*key) for key in tensors)]
        for node, name in zip([n for n in module.graph.nodes if n.op == "placeholder"], names, strict=True):
            node.name = node.target = name
        weights = {_identifier(*key): w for key, w in self.weights.items()}
        graph = Graph(fx=module.graph, inputs=inputs, states={}, weights=weights, symbols=sizes.names, entry_point="embed")
        lift_attributes(graph, module)
        graph = pool_sequences(unbatch(canonicalize(graph)))
        drop_unused(graph)
        graph.verify()
        self._check(graph)
        return graph

    def _needed(self) -> list[onnx.NodeProto]:
        """The nodes of the network, in order; what indices and masks are made from is left out."""
        needed: set[str] = set()
        pending = [self.output]
        while pending:
            value = pending.pop()
            node = self.file.producers.get(value)
            if node is None or node.output[0] in needed:
                continue
            needed.add(node.output[0])
            found = self.attentions.get(value)
            if found is not None:
                pending += [found.q, found.k_t, found.v]
            elif node.op_type == "Gather" and self._is_table(node.input[0]):
                if self.file.constant_type(node.input[1]) is None:
                    self.indices.setdefault(node.input[1], index(self.file, node, node.input[1]))
            elif node.op_type == "Cast" and counts_tokens(self.file, node.input[0]):
                self.indices.setdefault(node.input[0], index(self.file, node, node.input[0]))
            else:
                pending += node.input
        return [n for n in self.file.nodes if n.output[0] in needed]

    def _is_table(self, name: str) -> bool:
        kind = self.file.constant_type(name)
        return kind is not None and kind[0].is_floating_point and len(kind[1]) == 2

    def _rows(self, kind: str) -> int | None:
        tables = [n.input[0] for n in self.nodes if n.op_type == "Gather" and (i := self.indices.get(n.input[1])) is not None and i.kind == kind]
        return self.file.constant_type(tables[0])[1][0] if tables else None  # type: ignore[index]

    def _weights(self) -> tuple[dict[tuple[str, bool], Weight], dict[str, onnx.NodeProto]]:
        """Constants that the network reads, by (name, transposed); and products whose bias comes in an Add behind them."""
        weights: dict[tuple[str, bool], Weight] = {}
        biases: dict[str, onnx.NodeProto] = {}
        for node in self.nodes:
            for place, name in enumerate(node.input):
                kind = self.file.constant_type(name)
                if kind is None or not kind[0].is_floating_point or int(np.prod(kind[1])) == 1:
                    continue
                product = node.op_type in ("MatMul", "Gemm") and place == 1 and len(kind[1]) == 2
                transposed = product and not (node.op_type == "Gemm" and _transposes(node))
                recipe = Recipe("tensor", (name,))
                weights[name, transposed] = Weight(
                    Recipe("transpose", (0, 1), (recipe,)) if transposed else recipe, torch.float32, kind[1][::-1] if transposed else kind[1]
                )
                users = self.file.users.get(node.output[0], [])
                if product and node.op_type == "MatMul" and len(users) == 1 and users[0].op_type == "Add" and self._is_bias(users[0], node, kind[1][1]):
                    biases[node.output[0]] = users[0]
        return weights, biases

    def _is_bias(self, add: onnx.NodeProto, matmul: onnx.NodeProto, width: int) -> bool:
        other = next((i for i in add.input if i != matmul.output[0]), "")
        kind = self.file.constant_type(other)
        return kind is not None and kind[1] == (width,)

    def _check(self, graph: Graph) -> None:
        """OnnxFileError unless texts packed into one step get the embeddings that ONNX's reference implementation gives each alone."""
        given = feeds(self.file, sum(_TEXTS))
        texts = np.split(given["input_ids"][0] % max(self.vocab_size, 1), np.cumsum(_TEXTS)[:-1])
        alone = []
        for ids in texts:
            n = len(ids)
            every = {"input_ids": ids, "attention_mask": np.ones(n), "token_type_ids": np.zeros(n), "position_ids": np.arange(n)}
            one = {name: every[name][None].astype(given[name].dtype) for name in self.file.inputs}
            [hidden] = self.file.reference.run([self.output], one)
            alone.append(torch.from_numpy(np.asarray(hidden)).reshape(n, -1).float())
        values = {name: w.recipe.run(self.file.tensors, graph.constants).to(w.dtype) for name, w in graph.weights.items()}
        values |= {
            "input_ids": torch.from_numpy(np.concatenate(texts)).int(),
            "positions": torch.cat([torch.arange(n, dtype=torch.int32) for n in _TEXTS]),
            "cu_seqlens_q": torch.tensor([0, *accumulate(_TEXTS)], dtype=torch.int32),
            "pooling": torch.arange(len(_TEXTS), dtype=torch.int32),
        }
        (embeddings,), _ = graph.run(values)
        expected = torch.stack([(h.mean(0), h[0], h[-1])[i] for i, h in enumerate(alone)])
        error = float((embeddings - expected).abs().max() / expected.abs().max())
        if not error < TOLERANCE:
            raise OnnxFileError(f"{self.file.path}: embeddings of packed texts differ from those of the file by {error:.1e}; it cannot be compiled")


def _hidden_states(file: OnnxFile) -> str:
    """The output that has a vector for each token."""
    outputs = {o.name: o.type.tensor_type for o in file.model.graph.output}
    named = [n for n in _HIDDEN if n in outputs]
    whole = [n for n, t in outputs.items() if t.HasField("shape") and len(t.shape.dim) == 3]
    if not named and len(whole) != 1:
        names = ", ".join(outputs)
        raise OnnxFileError(f"{file.path} has the outputs {names}; an encoder has {_HIDDEN[0]} [batch, sequence, hidden]: export it without a head")
    return named[0] if named else whole[0]


def _transposes(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and a.i for a in node.attribute)


def _identifier(name: str, transposed: bool) -> str:
    word = "".join(c if c.isalnum() else "_" for c in name).strip("_")
    return f"weight_{word}" + ("_transposed" if transposed else "")
