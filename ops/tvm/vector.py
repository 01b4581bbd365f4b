"""The vocabulary that CPU kernels are written in: float32 vectors as wide as the target's registers.

TVMScript gives a kernel its loops, indices and branches. What moves and computes vectors are the functions below, in LLVM
IR, inlined into the kernel: TVM has no masked loads, its bfloat16 vectors do not survive code generation, and its `exp` is
scalar. A kernel's text contains those that it calls, so it can be read and compiled alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from textwrap import indent

import torch

from ..dims import Dim, show
from ..kernel import Call, Operand, Steps, Tensor
from ..target import Target
from . import llvm

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""What kernels read and write; they compute in float32."""

CACHE_DTYPES = DTYPES | {torch.float8_e4m3fn: "float8_e4m3fn", torch.int8: "int8"}
"""What a KV cache may hold. TVM sees float8 as the int8 that memory holds."""

INDEX_DTYPES = {torch.int32: "int32", torch.int64: "int64"}


Buffer = tuple[str, str, Sequence[int | str]]
"""A parameter of a kernel: name, dtype, shape. A name in a shape is a size that is known when the kernel runs."""


class Vectors:
    """Expressions and statements of TVMScript over vectors of a target: `lanes` float32, of TVM's type `type`.

    `ref` is a buffer element such as "x[t, k]", the first of those that are read or written; `count`, when given, is how
    many of them there are, at most a vector's: the others are read as 0 and not written.
    """

    def __init__(self, target: Target) -> None:
        self.lanes = 16 if {"avx512f", "avx512bw", "avx512vl"} <= target.features else 8
        self.native_bfloat16 = self.lanes == 16 and "avx512_bf16" in target.features
        self.native_bytes = self.lanes == 16 and "avx512_vnni" in target.features
        self.type, self.integer_type = f"float32x{self.lanes}", f"int32x{self.lanes}"

    def splat(self, scalar: str | float) -> str:
        """A float32 in every lane."""
        value = scalar if isinstance(scalar, str) else f"T.float32({scalar!r})"
        return f"T.broadcast({value}, {self.lanes})"

    def call(self, function: str, *args: str) -> str:
        """A vector from one of the functions below: "exp", "silu", …"""
        return f'T.call_extern("{self.type}", "{function}", {", ".join(args)})'

    def integers(self, function: str, *args: str) -> str:
        """A vector of int32, or of four bytes a lane, from one of the functions of `llvm.py`: "load_bytes", "dot_bytes", …"""
        return f'T.call_extern("{self.integer_type}", "{function}", {", ".join(args)})'

    def splat_integer(self, scalar: str) -> str:
        """An int32 in every lane."""
        return f"T.broadcast({scalar}, {self.lanes})"

    def sum(self, vector: str) -> str:
        return f'T.call_extern("float32", "sum", {vector})'

    def max(self, vector: str) -> str:
        return f'T.call_extern("float32", "max", {vector})'

    def first(self, vector: str) -> str:
        """Lane 0."""
        return f'T.call_extern("float32", "first", {vector})'

    def load(self, dtype: str, ref: str, count: str | None = None) -> str:
        """`lanes` elements as float32."""
        return self.call(f"load_{dtype}", _address(ref)) if count is None else self.call(f"load_part_{dtype}", _address(ref), count)

    def store(self, dtype: str, ref: str, vector: str, count: str | None = None) -> str:
        """A statement that rounds to nearest even, saturates in int8 and float8, and writes `lanes` elements."""
        name, args = (f"store_{dtype}", [vector]) if count is None else (f"store_part_{dtype}", [vector, count])
        return f'T.evaluate(T.call_extern("void", "{name}", {_address(ref)}, {", ".join(args)}))'

    def load_one(self, dtype: str, ref: str) -> str:
        """One element as a float32."""
        return f'T.call_extern("float32", "load_one_{dtype}", {_address(ref)})'

    def store_one(self, dtype: str, ref: str, scalar: str) -> str:
        return f'T.evaluate(T.call_extern("void", "store_one_{dtype}", {_address(ref)}, {scalar}))'

    def prefetch(self, ref: str) -> str:
        """A statement that asks for the cache line of an element, which need not exist, to be brought to the second cache."""
        return f'T.evaluate(T.call_extern("void", "prefetch", {_address(ref)}))'

    def step(self, dtype: str) -> int:
        """How many elements one `dot` consumes: bfloat16 is multiplied in pairs."""
        return self.lanes * (2 if dtype == "bfloat16" else 1)

    def dot(self, dtype: str, acc: str, a: str, b: str, count: str | None = None) -> str:
        """acc + products of `step(dtype)` elements from refs a and b; the sum over its lanes is what counts."""
        args = [acc, _address(a), _address(b)]
        return self.call(f"dot_{dtype}", *args) if count is None else self.call(f"dot_part_{dtype}", *args, count)

    def over(self, size: int, body: Callable[[str, str | None], list[str]], depth: int) -> str:
        """A loop over a dimension by vectors, indented by `depth` levels: `body(first element, count)` gives its lines; the last vector may be a part."""
        whole, rest = size // self.lanes * self.lanes, size % self.lanes
        lines = [f"for k in T.serial({whole // self.lanes}):", *(f"    {line}" for line in body(f"k * {self.lanes}", None))] if whole else []
        return indent("\n".join(lines + (body(str(whole), str(rest)) if rest else [])), "    " * depth)

    def script(self, name: str, buffers: Sequence[Buffer], body: str, scalars: Sequence[tuple[str, str]] = (), apart: Collection[str] = ()) -> str:
        """The text of a PrimFunc `name` over buffers, then scalars (name, dtype); `body` may use the names of sizes, int32.

        Buffers named in `apart` are those of operands with `rows`.
        """
        sizes = dict.fromkeys(d for _, _, shape in buffers for d in shape if isinstance(d, str))
        lines = [f"{size} = T.int32()" for size in sizes]
        for buffer, dtype, shape in buffers:
            # The alignment of the element alone: a view may begin anywhere.
            held = "int8" if dtype == "float8_e4m3fn" else dtype
            strides = ""
            if buffer in apart:  # all of them: those of a dim of size 1 can be any
                names = [f"{buffer}_stride{i}" for i in range(len(shape))]
                lines += [f"{n} = T.int32()" for n in names]
                strides = f"strides=({', '.join(names)},), "
            lines.append(f'{buffer} = T.match_buffer({buffer}_, ({"".join(f"{d}, " for d in shape)}), "{held}", {strides}align={BYTES[dtype]})')
        declared = "\n".join(lines)
        parameters = ", ".join([f"{b}_: T.handle" for b, _, _ in buffers] + [f"{s}: T.{t}" for s, t in scalars])
        body = "\n".join(line for line in body.splitlines() if line.strip())
        return (
            f"@T.prim_func\ndef {name}({parameters}):\n"
            f'    T.func_attr({{"global_symbol": "{name}", "tirx.noalias": True}})\n{indent(declared, "    ")}\n'
            f'    with T.attr(0, "pragma_import_llvm", """{self._functions(body)}"""):\n{indent(body, " " * 8)}\n'
        )

    def _functions(self, body: str) -> str:
        """The LLVM functions that `body` calls, and those that they call."""
        definitions = llvm.functions(self.lanes, self.native_bfloat16, self.native_bytes)
        needed: dict[str, None] = {}
        waiting = re.findall(r'T\.call_extern\("\w+", "(\w+)"', body)
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed[name] = None
                waiting += [n for n in re.findall(r"@(\w+)\(", definitions[name]) if n in definitions]
        return "\n" + "".join(definitions[n] for n in definitions if n in needed)


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1, "int32": 4, "int64": 8, "uint8": 1}


def cache_operand(call: Call, name: str) -> Operand:
    """The argument `name`, a cache, as `script` declares it."""
    return Operand(arg=name, view=torch.int8 if call.args[name].dtype == torch.float8_e4m3fn else None)


def parallel(steps: Steps, tensor: Tensor, cost: int = 1) -> str:
    """The loop over a tensor's rows: parallel where there can be enough work to pay for waking the threads. `cost`: of an element, a copy's being 1."""
    return "T.parallel" if steps.bound(tensor.shape[0]) * math.prod(numbers(tensor.shape[1:])) * cost >= 1 << 15 else "T.serial"


def numbers(dims: Iterable[Dim]) -> tuple[int, ...]:
    """Sizes that are the same in every step. TypeError if one is not."""
    sizes = tuple(dims)
    if any(isinstance(d, dict) for d in sizes):
        raise TypeError(f"{' × '.join(map(show, sizes))} depends on the step")
    return sizes  # type: ignore[return-value]


def row_index(tensor: Tensor, row: str) -> tuple[str, str]:
    """The index of row number `row` of a tensor ["size", D] or ["size", H, D], and the number of its rows."""
    if len(tensor.shape) == 2:
        return row, "size"
    heads = tensor.shape[1]
    return f"{row} // {heads}, {row} % {heads}", f"size * {heads}"


def row_element(buffer: str, tensor: Tensor, indices: Sequence[str]) -> str:
    """An element of a buffer that `script` is told is `apart`. TVM ignores strides: the element is found along the last dim."""
    inner = numbers(tensor.shape[1:])
    terms = [f"({indices[0]}) * {buffer}_stride0", *(f"({index}) * {math.prod(inner[i + 1 :])}" for i, index in enumerate(indices[1:]))]
    return f"{buffer}[{'0, ' * len(inner)}{' + '.join(terms)}]"


def _address(ref: str) -> str:
    return f"T.address_of({ref})"
