"""An ONNX model while it is written: nodes, constants, and weights that are read when the file is."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from ingot.ops.errors import IngotError

OPSET = 20
IR_VERSION = 9
EXTERNAL_BYTES = 1 << 30
"""From so many bytes of weights on, they lie in a file of their own: protobuf ends at 2 GiB."""
_ALIGNMENT = 4096


class OnnxError(IngotError):
    """A graph has no ONNX form, or a file cannot be written or read; the message names the op or the file."""


class Value(str):
    """The name of a value in the ONNX graph, which a string constant of an op is not."""

    __slots__ = ()


@dataclass
class OnnxGraph:
    """`inputs` and `outputs`: (name, element type, sizes; a word is a size that changes)."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    inputs: list[tuple[str, int, list[str | int]]] = field(default_factory=list)
    outputs: list[tuple[str, int, list[str | int]]] = field(default_factory=list)

    def node(self, op: str, *inputs: str | None, num_outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; its output, or a tuple of several. A None among the inputs is one that is left out."""
        number = len(self.nodes)
        outputs = [Value(f"{op.lower()}_{number}" + (f"_{i}" if num_outputs > 1 else "")) for i in range(num_outputs)]
        self.nodes.append(helper.make_node(op, ["" if i is None else i for i in inputs], outputs, name=f"{op}_{number}", **attributes))
        return outputs[0] if num_outputs == 1 else tuple(outputs)

    def constant(self, array: np.ndarray) -> Value:
        """A constant; equal ones are one."""
        name = Value(f"constant_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex() if array.nbytes <= 64 else len(self.constants)}")
        self.constants.setdefault(name, array)
        return name

    def ints(self, *values: int) -> Value:
        """A vector of int64: shapes, axes, indices."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float | int, dtype: torch.dtype) -> Value:
        return self.constant(np.array(value, np.float32 if dtype.is_floating_point else np.int64))

    def input(self, name: str, kind: int, shape: list[str | int]) -> Value:
        self.inputs.append((name, kind, shape))
        return Value(name)

    def output(self, name: str, value: Value, shape: list[str | int]) -> None:
        """Declare a float32 result under a name of its own."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"output_{name}"))
        self.outputs.append((name, TensorProto.FLOAT, shape))

    def save(self, path: Path, read: Callable[[str], torch.Tensor], external_bytes: int = EXTERNAL_BYTES) -> None:
        """Write the model; `read` gives each weight by name. Many bytes go to `<path>.data` beside it. OnnxError when the disk is full."""
        size = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for dtype, shape in self.weights.values())
        data = path.with_name(f"{path.name}.data") if size >= external_bytes else None
        try:
            tensors = self._inline(read) if data is None else self._external(read, data)
            graph = helper.make_graph(self.nodes, path.stem, _typed(self.inputs), _typed(self.outputs), [*_tensors(self.constants), *tensors])
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="ingot")
            path.write_bytes(model.SerializeToString())
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
                raise
            raise OnnxError(f"cannot write {e.filename or path}: {e.strerror}; choose another place, or free some space") from None

    def _inline(self, read: Callable[[str], torch.Tensor]) -> list[onnx.TensorProto]:
        return [onnx.numpy_helper.from_array(_array(read(name)), name) for name in self.weights]

    def _external(self, read: Callable[[str], torch.Tensor], data: Path) -> list[onnx.TensorProto]:
        """One weight at a time, so that the model is never in memory as a whole."""
        tensors = []
        with data.open("wb") as file:
            for name in self.weights:
                array = _array(read(name))
                file.write(bytes(-file.tell() % _ALIGNMENT))
                place = {"location": data.name, "offset": str(file.tell()), "length": str(array.nbytes)}
                file.write(array.data)
                tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), data_location=TensorProto.EXTERNAL)
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=value)
                tensors.append(tensor)
        return tensors


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return np.ascontiguousarray((tensor.float() if tensor.is_floating_point() else tensor.long()).numpy())


def _tensors(arrays: dict[str, np.ndarray]) -> list[onnx.TensorProto]:
    return [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]


def _typed(values: Sequence[tuple[str, int, list[str | int]]]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in values]
