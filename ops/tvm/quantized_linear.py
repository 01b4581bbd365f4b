"""Products with integer weights: rows of x are rounded to 8 bits first, then multiplied four bytes at a time (VNNI where there is it).

Layout "tile16" of `formats/integer.py`: a task reads one tile, 16 rows of the weight, as one stream. A vector holds four columns of
each of these rows; it meets the same four bytes of a row of x in every lane, so that lanes are results and are never added up. Rows of
x go by eights and fours, for which a weight is loaded and unpacked once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from textwrap import indent
from typing import Any

import torch

from .. import formats
from ..dims import Dim
from ..formats.integer import TILE, Integer
from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .vector import DTYPES, Buffer, Vectors, numbers, parallel

PREFETCH = 64
"""How many vectors of weights, 64 bytes each, lie between what is asked for and what is used."""
PAD = 16
"""Rounded rows of x have a multiple of this many bytes, so that whole vectors can be written."""


@claims("quantized_linear", "tvm")
def quantized_linear(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    form, x = formats.get(call.args["format"]), call.args["x"]
    tensors = [call.args[a] for a in ("bias", "residual") if call.args[a] is not None]
    if not isinstance(form, Integer) or call.args["layout"] != "tile16" or not call.args["activation"].startswith("int8_"):
        return []
    if call.args["eps"] is not None:
        return []
    if len(x.shape) != 2 or x.dtype not in DTYPES or any(t.dtype != x.dtype for t in tensors) or call.args["scale"].dtype not in DTYPES:
        return []
    if math.prod(numbers(call.args["weight"].shape)) >= 1 << 31:  # indices are int32
        return []
    product = Product.of(Vectors(target), form, call.args, "", DTYPES[x.dtype], numbers(x.shape[1:])[0])
    rounded = tuple(Operand(scratch=i) for i in range(3))
    inputs = tuple(Operand(arg=a) for a in ("weight", "scale", "zero", "bias", "residual") if call.args[a] is not None)
    multiply = Source("quantized_linear", "tvm", "quantized_linear", _text(product, call, steps.bound(x.shape[0])))
    launches = product.rounding(Operand(arg="x"), rounded, x.shape[0], steps), Launch(multiply, (*rounded, *inputs, Operand(out=0)))
    return [Candidate("tiles", launches, product.rounded(x.shape[0]))]


def _text(product: Product, call: Call, max_rows: int) -> str:
    """Rounded rows times tiles, with the call's epilogue."""
    args, v, dtype = call.args, product.vectors, product.dtype
    tiles = args["weight"].shape[0]
    columns = args["n"] // 2 if args["act"] else args["n"]
    streams = ["task", f"{tiles // 2} + task"] if args["act"] else ["task"]

    def finish(totals: list[str], column: str, count: str | None) -> list[str]:
        result = totals[0]
        for addend in (a for a in ("bias", "residual") if args[a] is not None):
            result += f" + {v.load(dtype, f'bias[{column}]' if addend == 'bias' else f'residual[t + m, {column}]', count)}"
        if args["act"]:
            result = f"{v.call(args['act'], result)} * {totals[1]}"
        return [v.store(dtype, f"y[t + m, {column}]", result, count)]

    body = f"for task in T.parallel({tiles // len(streams)}):\n{indent(product.all_rows('0', 'rows', max_rows, streams, columns, finish), '    ')}"
    shapes: dict[str, tuple[int | str, ...]] = {"bias": (columns,), "residual": ("rows", columns)}
    addends: list[Buffer] = [(a, dtype, shape) for a, shape in shapes.items() if args[a] is not None]
    return v.script("quantized_linear", [*product.buffers("rows"), *addends, ("y", dtype, ("rows", columns))], body)


Finish = Callable[[list[str], str, str | None], list[str]]
"""(vectors of the result, of gate and up if there are two; their first column; how many columns there are) → statements that end a row `m` of a group."""


@dataclass(frozen=True)
class Product:
    """Rows of x [.., k] times tiles of a weight, in two kernels. A *block* is a run of columns that share a scale of x and one of the weight."""

    vectors: Vectors
    form: Integer
    dtype: str
    """Of x."""
    k: int
    activation: str
    parts: dict[str, Tensor]
    """Of the weight, by names that kernels know."""
    x_row: str = "t + m"
    """Row m of a group of rows of x, the group's number being t."""
    find_rows: str = ""
    """Statements of a group that make this known; a place for the group's size is left."""

    @classmethod
    def of(cls, vectors: Vectors, form: Integer, args: Mapping[str, Any], side: str, dtype: str, k: int) -> Product:
        """`side`: how the names of the parts among a call's arguments end, their first letters before it, if it is not empty."""
        parts = {p: args[f"{p[0]}{side}" if side else p] for p in ("weight", *form.parts[1:])}
        return cls(vectors, form, dtype, k, args["activation"], parts)

    @property
    def padded(self) -> int:
        return -(-self.k // PAD) * PAD

    @property
    def x_group(self) -> int:
        shared = self.activation.rpartition("_")[2]
        return self.k if shared == "token" else min(self.k, int(shared.removeprefix("group")))

    @property
    def block(self) -> int:
        return min(self.x_group, self.k if self.form.group < 0 else self.form.group)

    @property
    def x_groups(self) -> int:
        return -(-self.k // self.x_group)

    @property
    def blocks(self) -> int:
        return -(-self.k // self.block)

    def rounded(self, rows: Dim) -> tuple[Tensor, Tensor, Tensor]:
        """What rows become, as scratch."""
        return Tensor(torch.int8, (rows, self.padded)), Tensor(torch.float32, (rows, self.x_groups)), Tensor(torch.int32, (rows, self.blocks))

    def buffers(self, rows: str) -> list[Buffer]:
        """Rounded rows, and the weight's parts."""
        weight: list[Buffer] = [("weight", "uint8", numbers(self.parts["weight"].shape))]
        return [*self._rounded(rows), *weight, *((p, DTYPES[self.parts[p].dtype], numbers(self.parts[p].shape)) for p in self.form.parts[1:])]

    def _rounded(self, rows: str) -> list[Buffer]:
        return [("codes", "int8", (rows, self.padded)), ("scales", "float32", (rows, self.x_groups)), ("sums", "int32", (rows, self.blocks))]

    def rounding(self, x: Operand, rounded: tuple[Operand, ...], rows: Dim, steps: Steps) -> Launch:
        """x → codes, the scale of each group, and for each block the sum of its codes; a symmetric format's has −zero as a factor."""
        v, blocks = self.vectors, self.x_group // self.block
        factor = "" if self.form.zero else f" * {-self.form.middle}"

        def group(number: str, begin: str, size: int) -> list[str]:
            largest = v.over(size, lambda k, count: [f"largest[0] = {v.call('larger', 'largest[0]', v.load(self.dtype, f'x[t, {begin} + {k}]', count))}"], 0)
            lines = [
                f'largest = T.alloc_buffer((1,), "{v.type}", scope="global")',
                f"largest[0] = {v.splat(0.0)}",
                *largest.splitlines(),
                f"most: T.let = {v.max('largest[0]')}",
                "inverse: T.let = T.Select(most > T.float32(0), T.float32(127) / most, T.float32(0))",
                f"scales[t, {number}] = most / T.float32(127)",
            ]
            whole, rest = size // self.block, size % self.block
            if whole:
                lines += [
                    f"for b in T.serial({whole}):",
                    *(f"    {line}" for line in codes(f"{number} * {blocks} + b", f"{begin} + b * {self.block}", self.block)),
                ]
            return lines + (codes(f"{number} * {blocks} + {whole}", f"{begin} + {whole * self.block}", rest) if rest else [])

        def codes(number: str, begin: str, size: int) -> list[str]:
            def vector(k: str, count: str | None) -> list[str]:
                scaled = f"{v.load(self.dtype, f'x[t, {begin} + {k}]', count)} * {v.splat('inverse')}"
                return [
                    f"code: T.let = {v.integers('rounded', scaled)}",
                    f'T.evaluate(T.call_extern("void", "store_bytes", T.address_of(codes[t, {begin} + {k}]), code))',
                    "total[0] = total[0] + code",
                ]

            return [
                f'total = T.alloc_buffer((1,), "{v.integer_type}", scope="global")',
                f"total[0] = {v.splat_integer('0')}",
                *v.over(size, vector, 0).splitlines(),
                f'sums[t, {number}] = T.call_extern("int32", "sum_integers", total[0]){factor}',
            ]

        whole, rest = self.k // self.x_group, self.k % self.x_group
        lines = [f"for g in T.serial({whole}):", *(f"    {line}" for line in group("g", f"g * {self.x_group}", self.x_group))]
        lines += group(str(whole), str(whole * self.x_group), rest) if rest else []
        body = f"for t in {parallel(steps, Tensor(torch.float32, (rows, self.k)), cost=4)}(rows):\n{indent(chr(10).join(lines), '    ')}"
        text = v.script("round_rows", [("x", self.dtype, ("rows", self.k)), *self._rounded("rows")], body)
        return Launch(Source("round_rows", "tvm", "round_rows", text), (x, *rounded))

    def all_rows(self, first: str, count: str, most: int, streams: list[str], columns: int, finish: Finish) -> str:
        """`count` rows of x, at most `most`, from number `first` on, times the streams' tiles: by eights, fours and ones."""
        lines, done = [], "0"
        for size in (size for size in (8, 4) if size <= most):
            lines += [f"for group in T.serial(({count} - {done}) // {size}):", self._rows(size, f"{first} + {done} + group * {size}", streams, columns, finish)]
            done = f"{count} // {size} * {size}"
        lines += [f"for single in T.serial({count} - {done}):", self._rows(1, f"{first} + {done} + single", streams, columns, finish)]
        return "\n".join(lines)

    def _rows(self, size: int, first: str, streams: list[str], columns: int, finish: Finish) -> str:
        v = self.vectors
        places = [(s, p) for s in range(len(streams)) for p in range(TILE // v.lanes)]
        lines = [f"t: T.let = {first}", *self.find_rows.format(size).splitlines()]
        lines += [f'total_{s}{p} = T.alloc_buffer(({size},), "{v.type}", scope="global")' for s, p in places]
        lines += [f"for m in T.unroll({size}):", *(f"    total_{s}{p}[m] = {v.splat(0.0)}" for s, p in places)]
        whole, rest = self.k // self.block, self.k % self.block
        lines += [f"for b in T.serial({whole}):", indent(self._block("b", self.block, size, streams, places), "    ")]
        lines += [self._block(str(whole), rest, size, streams, places)] if rest else []
        lines += [f"for m in T.unroll({size}):"]
        for p in range(TILE // v.lanes):
            column = f"task * {TILE} + {p * v.lanes}"
            there = f"T.min(T.max({columns} - ({column}), 0), {v.lanes})" if columns % TILE else None
            lines += [f"    {line}" for line in finish([f"total_{s}{p}[m]" for s in range(len(streams))], column, there)]
        return indent("\n".join(lines), "    ")

    def _block(self, b: str, length: int, size: int, streams: list[str], places: list[tuple[int, int]]) -> str:
        """Block number `b`, of `length` columns: its products in integers, then scaled and added."""
        v, per_byte = self.vectors, 8 // self.form.bits
        step = 4 * per_byte
        begin = f"{b} * {self.block // step}"
        start = v.splat_integer("0" if self.form.zero else f"sums[{self.x_row}, {b}]")
        lines = [f'acc_{s}{p} = T.alloc_buffer(({size},), "{v.integer_type}", scope="global")' for s, p in places]
        lines += [f"for m in T.unroll({size}):", *(f"    acc_{s}{p}[m] = {start}" for s, p in places)]
        lines += [f"for c in T.serial({-(-length // step)}):"]
        for s, p in places:
            at = f"weight[{streams[s]}, {begin} + c, {p * v.lanes}, 0]"
            lines += [f"    {v.prefetch(f'weight[{streams[s]}, {begin} + c + {PREFETCH}, 0, 0]')}"] if p == 0 else []
            lines += [f"    bytes_{s}{p}: T.let = {v.integers('load_bytes', f'T.address_of({at})')}"]
            if per_byte == 2:
                lines += [f"    codes_{s}{p}_{h}: T.let = {v.integers(f, f'bytes_{s}{p}')}" for h, f in enumerate(("low_nibbles", "high_nibbles"))]
        lines += [f"    for m in T.unroll({size}):"]
        for h in range(per_byte):
            four = v.integers("splat_bytes", f"T.address_of(codes[{self.x_row}, ({begin} + c) * {step} + {4 * h}])")
            for s, p in places:
                w = f"codes_{s}{p}_{h}" if per_byte == 2 else f"bytes_{s}{p}"
                lines += [f"        acc_{s}{p}[m] = {v.integers('dot_bytes', f'acc_{s}{p}[m]', w, four)}"]
        of_weight = "0" if self.form.group < 0 else f"{b} // {self.form.group // self.block}" if self.form.group > self.block else b
        of_x = "0" if self.x_groups == 1 else f"{b} // {self.x_group // self.block}" if self.x_group > self.block else b
        for s, p in places:
            scale = v.load(DTYPES[self.parts["scale"].dtype], f"scale[{streams[s]}, {of_weight}, {p * v.lanes}]")
            lines += [f"scale_{s}{p}: T.let = {scale}"]
            if self.form.zero:
                lines += [f"zero_{s}{p}: T.let = {v.load(DTYPES[self.parts['zero'].dtype], f'zero[{streams[s]}, {of_weight}, {p * v.lanes}]')}"]
        lines += [f"for m in T.unroll({size}):"]
        for s, p in places:
            product = v.call("integers_as_floats", f"acc_{s}{p}[m]")
            if self.form.zero:
                total = v.splat(f"T.float32(1) * sums[{self.x_row}, {b}]")
                product = f"({product} - zero_{s}{p} * {total})"
            lines += [f"    total_{s}{p}[m] = total_{s}{p}[m] + {product} * (scale_{s}{p} * {v.splat(f'scales[{self.x_row}, {of_x}]')})"]
        return "\n".join(lines)
