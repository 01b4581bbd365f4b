"""RMSNorm, alone, behind a residual addition and with a gate: one task a row, which stays in the first cache between the two passes."""

from __future__ import annotations

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .vector import DTYPES, Buffer, Vectors, numbers, parallel, row_index


@claims("rms_norm", "tvm")
def rms_norm(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, target, ("y",))


@claims("add_rms_norm", "tvm")
def add_rms_norm(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    return _candidates(call, steps, target, ("y", "total"))


def _candidates(call: Call, steps: Steps, target: Target, outputs: tuple[str, ...]) -> list[Candidate]:
    x: Tensor = call.args["x"]
    weight: Tensor | None = call.args["weight"]
    if x.dtype not in DTYPES or len(x.shape) not in (2, 3) or (weight is not None and weight.dtype not in DTYPES):
        return []
    inputs = [n for n in ("x", "residual", "weight") if call.args.get(n) is not None]
    operands = [Operand(arg=n) for n in inputs] + [Operand(out=i) for i in range(len(outputs))]
    text = _script(Vectors(target), call, steps, inputs, outputs)
    return [Candidate("rows", (Launch(Source(call.op, "tvm", call.op, text), tuple(operands)),))]


def _script(v: Vectors, call: Call, steps: Steps, inputs: list[str], outputs: tuple[str, ...]) -> str:
    x: Tensor = call.args["x"]
    dtype, widths = DTYPES[x.dtype], numbers(x.shape[1:])
    d = widths[-1]
    row, rows = row_index(x, "row")
    shape: tuple[int | str, ...] = ("size", *widths)
    buffers: list[Buffer] = [(n, DTYPES[call.args[n].dtype], (d,) if n == "weight" else shape) for n in inputs]
    buffers += [(n, dtype, shape) for n in outputs]
    source = "total" if "total" in outputs else "x"

    def square(k: str, count: str | None) -> list[str]:
        lines = [f"element: T.let = {v.load(dtype, f'{source}[{row}, {k}]', count)}", "squares[0] = squares[0] + element * element"]
        if source == "total":  # its rounding is part of what is normalized
            added = f"{v.load(dtype, f'x[{row}, {k}]', count)} + {v.load(dtype, f'residual[{row}, {k}]', count)}"
            lines.insert(0, v.store(dtype, f"total[{row}, {k}]", added, count))
        return lines

    def scale(k: str, count: str | None) -> list[str]:
        result = f"{v.load(dtype, f'{source}[{row}, {k}]', count)} * {v.splat('scale[0]')}"
        if "weight" in inputs:
            offset = f" + {v.splat(call.args['offset'])}" if call.args["offset"] else ""
            result += f" * ({v.load(DTYPES[call.args['weight'].dtype], f'weight[{k}]', count)}{offset})"
        return [v.store(dtype, f"y[{row}, {k}]", result, count)]

    return v.script(
        call.op,
        buffers,
        f"""
for row in {parallel(steps, x)}({rows}):
    squares = T.alloc_buffer((1,), "{v.type}", scope="global")
    scale = T.alloc_buffer((1,), "float32", scope="global")
    squares[0] = {v.splat(0.0)}
{v.over(d, square, 1)}
    scale[0] = T.float32(1) / T.sqrt({v.sum("squares[0]")} / T.float32({d}) + T.float32({call.args["eps"]!r}))
{v.over(d, scale, 1)}
""",
    )


@claims("rms_norm_gated", "tvm")
def rms_norm_gated(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """A task a row again, its groups one after the other."""
    x, gate, weight = (call.args[n] for n in ("x", "gate", "weight"))
    if any(t is not None and t.dtype not in DTYPES for t in (x, gate, weight)) or len(x.shape) not in (2, 3):
        return []
    v, widths = Vectors(target), numbers(x.shape[1:])
    d = widths[-1]
    group = call.args["group"] or d
    row, rows = row_index(x, "row")

    def value(k: str, count: str | None) -> tuple[str, str]:
        """x and its gate."""
        parts = [v.load(DTYPES[t.dtype], f"{n}[{row}, first + {k}]", count) for n, t in (("x", x), ("gate", gate))]
        return parts[0], v.call(call.args["act"], parts[1])

    def square(k: str, count: str | None) -> list[str]:
        h, g = value(k, count)
        return [f"element: T.let = {h if call.args['norm_first'] else f'{h} * {g}'}", "squares[0] = squares[0] + element * element"]

    def scale(k: str, count: str | None) -> list[str]:
        weighted = f" * {v.load(DTYPES[weight.dtype], f'weight[first + {k}]', count)}" if weight is not None else ""
        return [v.store(DTYPES[x.dtype], f"y[{row}, first + {k}]", f"{' * '.join(value(k, count))} * {v.splat('scale[0]')}{weighted}", count)]

    shape: tuple[int | str, ...] = ("size", *widths)
    buffers: list[Buffer] = [("x", DTYPES[x.dtype], shape), ("gate", DTYPES[gate.dtype], shape)]
    buffers += [("weight", DTYPES[weight.dtype], (d,))] if weight is not None else []
    body = f"""
for row in {parallel(steps, x)}({rows}):
    squares = T.alloc_buffer((1,), "{v.type}", scope="global")
    scale = T.alloc_buffer((1,), "float32", scope="global")
    for g in T.serial({d // group}):
        first: T.let = g * {group}
        squares[0] = {v.splat(0.0)}
{v.over(group, square, 2)}
        scale[0] = T.float32(1) / T.sqrt({v.sum("squares[0]")} / T.float32({group}) + T.float32({call.args["eps"]!r}))
{v.over(group, scale, 2)}
"""
    text = v.script(call.op, [*buffers, ("y", DTYPES[x.dtype], shape)], body)
    operands = [Operand(arg=n) for n, _, _ in buffers]
    return [Candidate("rows", (Launch(Source(call.op, "tvm", call.op, text), (*operands, Operand(out=0))),))]
