"""What a compiler of kernels is given. Imports no torch: the processes that compile start without."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Backend = Literal["tvm", "triton", "torch"]


@dataclass(frozen=True)
class Source:
    """A kernel before compilation.

    tvm: `text` is a TVMScript module whose PrimFunc is `symbol`. triton: `text` is Python with a `@triton.jit` function
    `symbol`; `signature` gives each run-time argument's type in order ("*bf16", "i32", "fp32"), `constants` the constexprs;
    every pointer, and each size named in `divisible`, is a multiple of 16. A kernel with a constexpr `PDL`, which the compiler
    of the source binds, may start before its predecessor has ended (programmatic dependent launch, sm_90 on): with PDL it must
    call `tl.extra.cuda.gdc_wait()` before it reads or writes anything but weights, the step's own inputs and older pages of the KV cache.
    """

    family: str
    backend: Backend
    symbol: str
    text: str
    signature: dict[str, str] = field(default_factory=dict, hash=False)
    constants: dict[str, Any] = field(default_factory=dict, hash=False)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
