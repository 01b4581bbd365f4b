"""Runs Triton kernels on numpy, in a process of its own: `TRITON_INTERPRET` changes what `@triton.jit` makes, for good.

Reads one JSON object a line from stdin: the file of the kernel's source, its symbol and constants, the grid, and its
arguments, tensors as places in a memory-mapped file that both processes share. Answers each with a line: "" or an error.
"""

import dataclasses
import importlib.util
import json
import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_cast, _dot, _patch_tensor = Builder.cast_impl, Builder.create_dot, interpreter._patch_lang_tensor
_fp_to_fp_of_triton, _binary_of_triton = Builder.create_fp_to_fp, Builder.binary_op


def _bfloat16_to_float32(data):
    return (data.astype(np.uint32) << 16).view(np.float32)


def _cast_rounding(self, src, dst_type):
    """bfloat16 lies in uint16 here, and Triton 3.6's interpreter truncates to it; hardware rounds to nearest even."""
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        return Handle(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), tl.bfloat16)
    if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
        return Handle(_bfloat16_to_float32(src.data), tl.float32)
    if dst_type.scalar == tl.bfloat16 and src.dtype.scalar.is_int():
        return _cast_rounding(self, Handle(src.data.astype(np.float32), tl.float32), dst_type)
    return _cast(self, src, dst_type)


def _fp_to_fp(self, src, dst_type, rounding_mode):
    """float8 lies in uint8; Triton 3.6's interpreter does not carry where rounding overflows the mantissa. Hardware saturates."""
    types = {tl.float8e4nv: torch.float8_e4m3fn}
    if src.dtype.scalar in types:
        exact = torch.from_numpy(np.array(src.data)).view(types[src.dtype.scalar]).float().numpy()
        return self.cast_impl(Handle(exact, tl.float32), dst_type) if dst_type.scalar != tl.float32 else Handle(exact, tl.float32)
    if dst_type.scalar in types:
        exact = torch.from_numpy(np.array(self.cast_impl(src, tl.float32).data))
        return Handle(exact.clamp(-448, 448).to(types[dst_type.scalar]).view(torch.uint8).numpy(), dst_type.scalar)
    return _fp_to_fp_of_triton(self, src, dst_type, rounding_mode)


def _dot_of_bfloat16(self, a, b, d, *rest):
    """The interpreter would multiply the uint16 patterns as integers."""
    a, b = (Handle(_bfloat16_to_float32(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h for h in (a, b))
    return _dot(self, a, b, d, *rest)


def _binary(self, lhs, rhs, op):
    """Arithmetic on bfloat16 would be done on its uint16 patterns."""
    if lhs.dtype.scalar != tl.bfloat16:
        return _binary_of_triton(self, lhs, rhs, op)
    exact = op(_bfloat16_to_float32(lhs.data), _bfloat16_to_float32(rhs.data))
    return _cast_rounding(self, Handle(exact, tl.float32), tl.bfloat16)


def _index(tensor, scope):
    """numpy 2.4 no longer turns an array of one element into an int: loop bounds need it."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


Builder.cast_impl, Builder.create_dot, Builder.create_fp_to_fp, interpreter._patch_lang_tensor = _cast_rounding, _dot_of_bfloat16, _fp_to_fp, _index
Builder.binary_op = _binary
# what takes most of the time of small blocks: proofs that no integer overflows, and a dictionary or a tuple of objects made anew for each value
interpreter.interpreter_builder.options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
_np_dtype_of_triton, _init_block_of_triton = interpreter._get_np_dtype, tl.core.block_type.__init__
_np_dtypes, _shapes, _blocks = {}, {}, {}


def _np_dtype(dtype):
    if dtype.name not in _np_dtypes:
        _np_dtypes[dtype.name] = _np_dtype_of_triton(dtype)
    return _np_dtypes[dtype.name]


def _init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    if type.name not in _shapes:
        shape = type.shape if type.is_block() else ()
        _shapes[type.name] = tl.core.tuple([tl.constexpr(s) for s in shape]), tl.constexpr(math.prod(shape))
    self.shape, self.numel = _shapes[type.name]


def _init_block(self, element_ty, shape):
    key = element_ty.name, *(getattr(s, "value", s) for s in shape)
    if key not in _blocks:
        _init_block_of_triton(self, element_ty, shape)
        _blocks[key] = self.__dict__
    self.__dict__ = _blocks[key]


interpreter._get_np_dtype, tl.core.tensor.__init__, tl.core.block_type.__init__ = _np_dtype, _init_tensor, _init_block
# patch tl.core once instead of at every call of tl.sum and its like
interpreter._patch_lang(tl.sum.fn)
interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


def _kernel(path, symbol):
    spec = importlib.util.spec_from_file_location("kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, symbol)


def _argument(memory, arg):
    if not isinstance(arg, dict):
        return arg
    return memory[arg["begin"] : arg["end"]].view(getattr(torch, arg["dtype"]))


def main():
    memory = torch.from_file(sys.argv[1], shared=True, size=int(sys.argv[2]), dtype=torch.uint8)
    kernels = {}
    for line in sys.stdin:
        job = json.loads(line)
        key = job["path"], job["symbol"]
        if key not in kernels:
            kernels[key] = _kernel(*key)
        args = {name: _argument(memory, arg) for name, arg in job["args"].items()}
        error = ""
        try:
            kernels[key][tuple(job["grid"])](**args, **job["constants"])
        except interpreter.InterpreterError as failure:
            error = str(failure)
        print(json.dumps(error), flush=True)


main()
