"""From a family's jitted functions to a `Launch`: self-contained source text, signature and constants."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from triton import JITFunction

from ..dims import Dim, evaluate, product
from ..kernel import Call, Launch, Operand, Source, Steps, Tensor
from ..target import Target

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
GLUON = """import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper
"""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def launch(call: Call, functions: Sequence[JITFunction], operands: Mapping[str, Operand], constants: Mapping[str, Any],
           grid: tuple[tuple[Dim, int], ...], *, scratch: Sequence[Tensor] = (), num_warps: int = 4, num_stages: int = 3) -> Launch:  # fmt: skip
    """A launch of the first of `functions`; the rest are what it calls. `operands` by parameter name, in the kernel's order.

    An operand whose argument the call leaves out becomes the constant None, so that the kernel asks `if bias is not None`.
    """
    absent = {p: None for p, o in operands.items() if o.arg is not None and call.args[o.arg] is None}
    present = {p: o for p, o in operands.items() if p not in absent}
    family = functions[0].fn.__module__.rsplit(".", 1)[-1]
    source = Source(
        family=f"triton_{family}",
        backend="triton",
        symbol=functions[0].__name__,
        text=text(*functions),
        signature={p: _type(call, o, scratch) for p, o in present.items()},
        constants=absent | dict(constants),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return Launch(source, tuple(present.values()), grid)


def text(*functions: JITFunction) -> str:
    """A module that holds the jitted functions and nothing else."""
    header = GLUON if functions[0].is_gluon() else "import triton\nimport triton.language as tl\n"
    return "\n\n".join([header, *(_source(f.fn) for f in reversed(functions))])


@functools.cache
def _source(function: Any) -> str:
    """Cached: finding where a function ends takes longer than all else that a candidate needs."""
    return inspect.getsource(function)


def _type(call: Call, operand: Operand, scratch: Sequence[Tensor]) -> str:
    if operand.arg is not None:
        return "*" + TYPES[call.args[operand.arg].dtype]
    if operand.out is not None:
        return "*" + TYPES[call.results[operand.out].dtype]
    if operand.scratch is not None:
        return "*" + TYPES[scratch[operand.scratch].dtype]
    return "fp32" if isinstance(operand.const, float) else "i32"


def rows(tensor: Tensor) -> Dim:
    """How many rows a tensor has: the product of all sizes but the last."""
    count: Dim = 1
    for size in tensor.shape[:-1]:
        count = product(count, size)
    return count


def most(dim: Dim, steps: Steps) -> int:
    """The largest value that a size takes in a variant."""
    return evaluate(dim, {"T": steps.max_tokens, "S": steps.max_seqs, "R": steps.max_rows})


def supported(call: Call, target: Target | None = None) -> bool:
    """Whether every tensor is of a type that kernels know; given the target, also whether its instructions convert float8 (from sm_89 on)."""
    dtypes = {t.dtype for t in (*call.args.values(), *call.results) if isinstance(t, Tensor)}
    return dtypes <= TYPES.keys() and (target is None or target.arch >= 89 or torch.float8_e4m3fn not in dtypes)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
