"""An ONNX file: checked, its weights by name, and parts of its graph evaluated on numbers. Nothing in it is code that runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import helper, inliner, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ingot.ops.errors import IngotError

_ON_ACTIVATIONS = frozenset("MatMul Gemm Softmax LayerNormalization Erf Gelu Tanh Sigmoid Conv Attention Einsum".split())
"""What is computed by these is no mask, position or type of a token."""


class OnnxFileError(IngotError):
    """An ONNX file is damaged, or asks for something that cannot be compiled; the message names the file, and the node if it is one's fault."""


class OnnxFile:
    """`nodes` in their order; `producers`: value → the node that makes it; `users`: value → the nodes that read it."""

    def __init__(self, path: Path, model: onnx.ModelProto) -> None:
        self.path = path
        self.model = model
        self.nodes = list(model.graph.node)
        self.inputs = [i.name for i in model.graph.input if i.name not in {t.name for t in model.graph.initializer}]
        self.producers = {o: n for n in self.nodes for o in n.output if o}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for value in node.input:
                self.users.setdefault(value, []).append(node)
        self._constants = {t.name: t for t in model.graph.initializer} | {n.output[0]: _tensor_of(n) for n in self.nodes if n.op_type == "Constant"}

    @classmethod
    def open(cls, path: Path) -> OnnxFile:
        """Read and check `path`. OnnxFileError when it is damaged, or data that it speaks of is missing or outside its folder."""
        try:
            model = onnx.load(str(path), load_external_data=False)
            for tensor in model.graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location":
                        _check_inside(path, entry.value)
            onnx.checker.check_model(str(path))
            model = inliner.inline_local_functions(model) if model.functions else model
        except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as e:
            raise OnnxFileError(f"{path} is not a whole ONNX file: {str(e).strip().splitlines()[0]}; export it again") from None
        for node in model.graph.node:
            if node.domain not in ("", "ai.onnx"):
                raise OnnxFileError(f"{path}: the node {node.name or node.output[0]} calls {node.domain}.{node.op_type}, and only standard ops are known; "
                                    "export the model without optimizations for a runtime")  # fmt: skip
        return cls(path, model)

    def error(self, node: onnx.NodeProto, why: str) -> OnnxFileError:
        """An error about `node`."""
        return OnnxFileError(f"{self.path}: the node {node.name or node.output[0]} ({node.op_type}) {why}")

    def constant(self, name: str) -> np.ndarray | None:
        """The array of an initializer or Constant node; None for another value."""
        tensor = self._constants.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor, str(self.path.parent)))

    def constant_type(self, name: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
        """Its dtype and shape, without reading it."""
        tensor = self._constants.get(name)
        if tensor is None:
            return None
        return torch.from_numpy(np.empty(0, helper.tensor_dtype_to_np_dtype(tensor.data_type))).dtype, tuple(tensor.dims)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Constants as a checkpoint's tensors."""
        return _Tensors(self, self._constants)

    @property
    def meta(self) -> Mapping[str, torch.Tensor]:
        """The same without data."""
        return _Tensors(self, self._constants, meta=True)

    def fingerprint(self) -> str:
        """SHA-256 of the file and of the data beside it."""
        digest = hashlib.sha256()
        names = {e.value for t in self.model.graph.initializer for e in t.external_data if e.key == "location"}
        for file in (self.path, *(self.path.parent / n for n in sorted(names))):
            with file.open("rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
        return digest.hexdigest()

    def is_side(self, name: str) -> bool:
        """Whether a value comes from the inputs' numbers and from shapes alone, with nothing that the network computes between."""
        return all(n.op_type not in _ON_ACTIVATIONS for n in self._ancestors(name, self.shapes))

    def asks_shapes(self, name: str) -> bool:
        """Whether a value depends on the shape of something that the network computes."""
        return name in self.shapes or any(i in self.shapes for n in self._ancestors(name, self.shapes) for i in n.input)

    def evaluate(self, name: str, feeds: Mapping[str, np.ndarray], shape: Callable[[str], Sequence[int]] | None = None) -> np.ndarray:
        """A value that `is_side`, for these inputs, by ONNX's reference implementation; `shape` tells those of activations."""
        nodes = self._ancestors(name, self.shapes)
        values = {v for n in nodes for v in n.input} | {name}
        if shape is not None:
            feeds = {**feeds, **{o: np.array(shape(self.producers[o].input[0]), np.int64) for o in self.shapes & values}}
        inputs = [helper.make_empty_tensor_value_info(i) for i in sorted({*self.inputs, *self.shapes} & values)]
        if missing := [i.name for i in inputs if i.name not in feeds]:
            raise OnnxFileError(f"{self.path}: {name} depends on {', '.join(missing)}, the shape of something that the network computes")
        initializers = [t for t in self.model.graph.initializer if t.name in values]
        for tensor in initializers:
            if tensor.external_data:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
        graph = helper.make_graph(nodes, "part", inputs, [helper.make_empty_tensor_value_info(name)], initializers)
        part = helper.make_model(graph, opset_imports=self.model.opset_import)
        [result] = ReferenceEvaluator(part, new_ops=[GatherElements]).run([name], {i.name: feeds[i.name] for i in inputs})
        return np.asarray(result)

    @cached_property
    def reference(self) -> Any:
        """ONNX's reference implementation of the whole."""
        return ReferenceEvaluator(onnx.load(str(self.path)), new_ops=[GatherElements])

    @cached_property
    def shapes(self) -> frozenset[str]:
        """Results of Shape nodes that ask about something the network computes."""
        found: set[str] = set()
        for node in self.nodes:  # in order: sizes may come from sizes
            if node.op_type == "Shape" and any(a.op_type in _ON_ACTIVATIONS for a in self._ancestors(node.input[0], found)):
                found.add(node.output[0])
        return frozenset(found)

    def _ancestors(self, name: str, given: Collection[str] = ()) -> list[onnx.NodeProto]:
        """The nodes that make a value, in order, from values that are `given`."""
        needed: set[str] = set()
        pending = [name]
        while pending:
            value = pending.pop()
            node = None if value in given else self.producers.get(value)
            if node is not None and node.output[0] not in needed:
                needed.add(node.output[0])
                pending += node.input
        return [n for n in self.nodes if n.output[0] in needed]


class GatherElements(OpRun):  # type: ignore[misc]
    """As the standard has it; onnx's own takes no more than 64 rows."""

    op_domain = ""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        return (np.take_along_axis(data, indices, axis),)


class _Tensors(Mapping[str, torch.Tensor]):
    def __init__(self, file: OnnxFile, names: Mapping[str, Any], meta: bool = False) -> None:
        self._file, self._names, self._meta = file, names, meta

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._meta:
            dtype, shape = self._file.constant_type(name) or (None, ())
            return torch.empty(shape, dtype=dtype, device="meta")
        array = self._file.constant(name)
        assert array is not None
        return torch.from_numpy(np.array(array))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}


def _tensor_of(node: onnx.NodeProto) -> onnx.TensorProto:
    value = next(iter(attributes(node).values()))
    return value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.array(value, np.float32 if _is_float(value) else np.int64))


def _is_float(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, (list, tuple)) and value else value, float)


def _check_inside(path: Path, location: str) -> None:
    parts = PurePosixPath(location).parts
    if location.startswith("/") or ".." in parts:
        raise OnnxFileError(f"{path} keeps weights at {location}, outside its folder; do not use this file, and ask where it came from")
