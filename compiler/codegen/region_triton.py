"""A region's program as a Triton kernel: a block of rows by a block of columns, or by all columns when they are reduced."""

from __future__ import annotations

from collections.abc import Collection

from ingot.ops.dims import evaluate
from ingot.ops.kernel import Call, Candidate, Launch, Operand, Source, Steps
from ingot.ops.triton.source import TYPES, power_of_two

from .region_program import Program, UnclaimedError, Value, is_reduction

MAX_REDUCED_WIDTH = 1 << 15
"""Columns that a program holds in registers at once."""

_EXPRESSIONS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}", "reciprocal": "1.0 / {0}",
    "abs": "tl.abs({0})", "sqrt": "tl.sqrt({0})", "rsqrt": "tl.rsqrt({0})", "exp": "tl.exp({0})", "log": "tl.log({0})", "sin": "tl.sin({0})",
    "cos": "tl.cos({0})", "erf": "tl.erf({0})", "floor": "tl.floor({0})", "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
    "tanh": "1.0 - 2.0 / (1.0 + tl.exp(2.0 * {0}))", "relu": "tl.maximum({0}, 0.0)", "maximum": "tl.maximum({0}, {1})", "minimum": "tl.minimum({0}, {1})",
    "gt": "{0} > {1}", "ge": "{0} >= {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "eq": "{0} == {1}", "ne": "{0} != {1}",
    "logical_and": "{0} & {1}", "logical_or": "{0} | {1}", "logical_not": "~{0}", "where": "tl.where({0}, {1}, {2})",
}  # fmt: skip
_REDUCE = {"sum": "tl.sum", "mean": "tl.sum", "max": "tl.max", "min": "tl.min"}
_NEUTRAL = {"sum": "0.0", "mean": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}


def candidates(program: Program, call: Call, steps: Steps, apart: Collection[str] = ()) -> list[Candidate]:
    """Launches of the program's kernel with four warps and with eight. `apart`: arguments whose rows may lie apart."""
    width, reduces = program.width, program.levels > 0
    if reduces and width > MAX_REDUCED_WIDTH:
        raise UnclaimedError(f"rows of {width} columns do not fit in registers")
    block_n = power_of_two(width) if reduces else min(power_of_two(width), 1024)
    rows = evaluate(program.rows, {"T": steps.max_tokens, "S": steps.max_seqs, "R": steps.max_rows})
    block_m = min(max(1, 1024 // block_n), power_of_two(rows))
    loads = dict.fromkeys(v.source for v in program.loads)
    signature = {name: "*" + TYPES[call.args[name].dtype] for name in loads}
    signature |= {f"out{i}": "*" + TYPES[t.dtype] for i, t in enumerate(program.results)} | {"num_rows": "i32"}
    operands = [Operand(arg=n, rows=n in apart) for n in loads] + [Operand(out=i) for i in range(len(program.results))] + [Operand(size=program.rows)]
    wide = [n for n in loads if n in apart]
    signature |= {f"{n}_pitch": "i32" for n in wide}
    operands += [Operand(pitch=n) for n in wide]
    text = _text(program, list(signature), wide)
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    grid = ((program.rows, block_m), (width, block_n))
    found = []
    for rank, warps in enumerate((4, 8)):
        source = Source("region", "triton", "region", text, signature, constants, num_warps=warps)
        found.append(Candidate(f"region_{block_m}x{block_n}_w{warps}", (Launch(source, tuple(operands), grid),), rank=rank))
    return found


def _text(program: Program, parameters: list[str], apart: Collection[str]) -> str:
    names: dict[Value, str] = {}
    lines = [
        "if PDL:",
        "    tl.extra.cuda.gdc_launch_dependents()",
        "    tl.extra.cuda.gdc_wait()",
        "row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]",
        "col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]",
    ]
    for value in program.values:
        names[value] = f"v{len(names)}"
        lines.append(f"{names[value]} = {_expression(program, value, names, apart)}")
    for i, (output, result) in enumerate(zip(program.outputs, program.results, strict=True)):
        by_column = result.shape == program.shape
        address = f"row * {program.width} + col" if by_column else "row"
        stored = names[output] if output.rows and (output.cols or not by_column) else f"{names[output]} + tl.zeros_like({address}).to(tl.float32)"
        lines.append(f"tl.store(out{i} + {address}, ({stored}).to(out{i}.dtype.element_ty), mask={_mask(program, True, by_column)})")
    body = "\n".join(f"    {line}" for line in lines)
    return (f"import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
            f"def region({', '.join(parameters)}, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr):\n{body}\n")  # fmt: skip


def _mask(program: Program, rows: bool, cols: bool) -> str:
    parts = (["(row < num_rows)"] if rows else []) + ([f"(col < {program.width})"] if cols else [])
    return " & ".join(parts) or "None"


def _expression(program: Program, value: Value, names: dict[Value, str], apart: Collection[str]) -> str:
    if value.op == "load":
        assert value.tensor is not None
        pointer = " + ".join([value.source, *_offsets(program, value, apart)])
        mask = _mask(program, value.rows, value.cols)
        other = "" if mask == "None" else f", mask={mask}, other=0.0"
        return f"tl.load({pointer}{other}).to(tl.float32)"
    args = [names[a] if isinstance(a, Value) else f'float("{a}")' if a in (float("inf"), -float("inf")) else repr(a) for a in value.args]
    if not is_reduction(value):
        return _EXPRESSIONS[value.op].format(*args)
    x = args[0]
    if program.width != power_of_two(program.width):
        x = f"tl.where(col < {program.width}, {x}, {_NEUTRAL[value.op]})"
    reduced = f"{_REDUCE[value.op]}({x}, 1)[:, None]"
    return f"{reduced} / {program.width}.0" if value.op == "mean" else reduced


def _offsets(program: Program, value: Value, apart: Collection[str]) -> list[str]:
    """What is added to a load's pointer: an index times its stride, per dim."""
    assert value.tensor is not None
    shape = value.tensor.shape
    offsets: list[str] = []
    stride: int | str = 1
    for size, index in reversed(list(zip(shape, program.index(shape, "row", "col"), strict=True))):
        if not isinstance(size, int) and value.source in apart:
            piece = 16 // value.tensor.dtype.itemsize  # where rows are pieces of 16 bytes, so is how far they are apart
            stride = f"({value.source}_pitch // {piece} * {piece})" if stride % piece == 0 else f"{value.source}_pitch"  # type: ignore[operator]
        if index != "0":
            offsets.append(f"({index}) * {stride}" if stride != 1 else f"({index})" if "%" in index or "/" in index else index)
        if isinstance(size, int):
            stride *= size  # type: ignore[operator]  # a symbolic size is the outermost: nothing is beyond it
    return offsets[::-1]
