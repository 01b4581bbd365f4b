"""Rotary position embedding: the tables, and the rotation, which `kv_cache.py` uses too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .vector import DTYPES, INDEX_DTYPES, Vectors, parallel


@dataclass(frozen=True)
class Rotation:
    """Rotates one head at a time; cos and sin are buffers [tokens, …] of `dtype`, indexed by `t`. `width`: the dims that are rotated."""

    vectors: Vectors
    style: str
    width: int
    dtype: str

    @classmethod
    def of(cls, vectors: Vectors, style: str, cos: Tensor) -> Rotation:
        columns = cos.shape[-1]
        assert isinstance(columns, int)
        return cls(vectors, style, columns * 2 if style.endswith("_half") else columns, DTYPES[cos.dtype])

    def __call__(self, load: Callable[[str, str | None], str], store: Callable[[str, str, str | None], str], size: int, depth: int) -> str:
        """Rotate `size` dims: `load(first, count)` is an expression for dims of x, `store(first, value, count)` a statement."""
        turned = self._interleaved if self.style.startswith("gptj") else self._halves
        rest = self.vectors.over(size - self.width, lambda k, n: [store(f"{self.width} + {k}", load(f"{self.width} + {k}", n), n)], depth)
        return f"{turned(load, store, depth)}\n{rest}"

    def _table(self, name: str, k: str, count: str | None) -> str:
        return self.vectors.load(self.dtype, f"{name}[t, {k}]", count)

    def _interleaved(self, load: Callable[[str, str | None], str], store: Callable[[str, str, str | None], str], depth: int) -> str:
        """Pairs (2i, 2i + 1)."""
        v = self.vectors

        def rotate(k: str, count: str | None) -> list[str]:
            if self.style == "gptj":
                cos, sin = (self._table(name, k, count) for name in ("cos", "sin"))
            else:
                pairs = str(int(count or v.lanes) // 2)
                cos, sin = (v.call("twice", self._table(name, f"({k}) // 2", pairs)) for name in ("cos", "sin"))
            return [f"pairs: T.let = {load(k, count)}", store(k, f"pairs * {cos} + {v.call('turn_pairs', 'pairs')} * {sin}", count)]

        return v.over(self.width, rotate, depth)

    def _halves(self, load: Callable[[str, str | None], str], store: Callable[[str, str, str | None], str], depth: int) -> str:
        """Pairs (i, i + width / 2); for dsv3 they come as (2i, 2i + 1)."""
        v, half = self.vectors, self.width // 2

        def rotate(k: str, count: str | None) -> list[str]:
            second = k if self.style.endswith("_half") else f"{half} + {k}"
            if self.style.startswith("dsv3"):
                elements = 2 * int(count or v.lanes)
                low = load(f"2 * ({k})", None if elements >= v.lanes else str(elements))
                high = load(f"2 * ({k}) + {v.lanes}", None if elements == 2 * v.lanes else str(elements - v.lanes)) if elements > v.lanes else v.splat(0.0)
                pair = [f"low: T.let = {low}", f"high: T.let = {high}"]
                pair += [f"a: T.let = {v.call('evens', 'low', 'high')}", f"b: T.let = {v.call('odds', 'low', 'high')}"]
            else:
                pair = [f"a: T.let = {load(k, count)}", f"b: T.let = {load(f'{half} + {k}', count)}"]
            return [
                *pair,
                store(k, f"a * {self._table('cos', k, count)} - b * {self._table('sin', k, count)}", count),
                store(f"{half} + {k}", f"b * {self._table('cos', second, count)} + a * {self._table('sin', second, count)}", count),
            ]

        return v.over(half, rotate, depth)


@claims("rope", "tvm")
def rope(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    x, cos, sin = call.args["x"], call.args["cos"], call.args["sin"]
    if x.dtype not in DTYPES or cos.dtype not in DTYPES or sin.dtype != cos.dtype or len(x.shape) != 3:
        return []
    v, dtype, (_, heads, size) = Vectors(target), DTYPES[x.dtype], x.shape
    rotated = Rotation.of(v, call.args["style"], cos)(
        lambda k, count: v.load(dtype, f"x[t, head, {k}]", count), lambda k, value, count: v.store(dtype, f"y[t, head, {k}]", value, count), size, 2
    )
    tables = [(name, DTYPES[cos.dtype], ("tokens", cos.shape[-1])) for name in ("cos", "sin")]
    buffers = [("x", dtype, ("tokens", heads, size)), *tables, ("y", dtype, ("tokens", heads, size))]
    text = v.script("rope", buffers, f"for t in {parallel(steps, x)}(tokens):\n    for head in T.serial({heads}):\n{rotated}")
    operands = (Operand(arg="x"), Operand(arg="cos"), Operand(arg="sin"), Operand(out=0))
    return [Candidate("tokens", (Launch(Source("rope", "tvm", "rope", text), operands),))]


@claims("rotary_embedding", "tvm")
def rotary_embedding(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    positions, inv_freq = call.args["positions"], call.args["inv_freq"]
    if positions.dtype not in INDEX_DTYPES or len(positions.shape) != 1 or inv_freq.dtype != torch.float32:
        return []
    pairs, columns = inv_freq.shape[0], call.results[0].shape[-1]
    scaling = f"T.float32({call.args['scaling']!r})"
    body = f"""
for t in {parallel(steps, call.results[0], cost=16)}(tokens):
    for k in T.serial({columns}):
        angle: T.let = T.cast(positions[t], "float32") * inv_freq[k % {pairs}]
        cos[t, k] = T.cos(angle) * {scaling}
        sin[t, k] = T.sin(angle) * {scaling}
"""
    tables = [(name, "float32", ("tokens", columns)) for name in ("cos", "sin")]
    buffers = [("positions", INDEX_DTYPES[positions.dtype], ("tokens",)), ("inv_freq", "float32", (pairs,)), *tables]
    text = Vectors(target).script("rotary_embedding", buffers, body)
    operands = (Operand(arg="positions"), Operand(arg="inv_freq"), Operand(out=0), Operand(out=1))
    return [Candidate("tokens", (Launch(Source("rotary_embedding", "tvm", "rotary_embedding", text), operands),))]
