"""Causal convolution and selective state spaces: a task owns a few rows of a sequence's state, which stay in the first cache from token to token."""

from __future__ import annotations

import math
from collections.abc import Callable
from textwrap import indent

from ..kernel import Call, Candidate, Steps, claims
from ..target import Target
from .sequences import candidate, divisor, recurrent, row, walk
from .vector import DTYPES, Vectors

WIDEST = 8
"""Tokens of a convolution: those before the last are held in registers."""


@claims("causal_conv1d", "tvm")
def causal_conv1d(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """A task is a vector of channels: their weights and last tokens are turned, so that a tap is a vector."""
    args, v = call.args, Vectors(target)
    channels, width = args["weight"].shape
    if not recurrent(call) or not 2 <= width <= WIDEST:
        return []
    x, state, weight = (DTYPES[args[n].dtype] for n in ("x", "conv_state", "weight"))
    taps = [f"{v.load('float32', f'weights[{j * v.lanes}]')} * {f'past[{j}]' if j < width - 1 else 'now'}" for j in range(width)]
    y = " + ".join(taps + ([v.load(DTYPES[args["bias"].dtype], "bias[c]", "count")] if args["bias"] is not None else []))
    body = walk(
        steps, call, -(-channels // v.lanes), 8 * width,
        local=f"""
            c: T.let = unit * {v.lanes}
            count: T.let = T.min({v.lanes}, {channels} - c)
            weights = T.alloc_buffer(({width * v.lanes},), "float32", scope="global")
            turned = T.alloc_buffer(({(width - 1) * v.lanes},), "float32", scope="global")
            past = T.alloc_buffer(({width - 1},), "{v.type}", scope="global")
        """,
        start=f"""
            for i in T.serial(count):
                for j in T.unroll({width}):
                    weights[j * {v.lanes} + i] = {v.load_one(weight, "weight[c + i, j]")}
                for j in T.unroll({width - 1}):
                    turned[j * {v.lanes} + i] = {v.load_one(state, "conv_state[slot, c + i, j]")}
            for j in T.unroll({width - 1}):
                past[j] = {v.load("float32", f"turned[j * {v.lanes}]")}
            if seq_lens[s] == end - begin:
                for j in T.unroll({width - 1}):
                    past[j] = {v.splat(0.0)}
        """,
        token=f"""
            now: T.let = {v.load(x, row(call, "x", "t", "c"), "count")}
            {v.store(x, "y[t, c]", v.call("silu", y) if args["act"] == "silu" else y, "count")}
            for j in T.unroll({width - 2}):
                past[j] = past[j + 1]
            past[{width - 2}] = now
        """,
        finish=f"""
            for j in T.unroll({width - 1}):
                {v.store("float32", f"turned[j * {v.lanes}]", "past[j]")}
            for i in T.serial(count):
                for j in T.unroll({width - 1}):
                    {v.store_one(state, "conv_state[slot, c + i, j]", f"turned[j * {v.lanes} + i]")}
        """,
        zero=v.store(x, "y[t, c]", v.splat(0.0), "count"),
    )  # fmt: skip
    return [candidate(v, call, "conv_state", body, ("x",))]


@claims("ssd_scan", "tvm")
def ssd_scan(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """A task is a few rows of a head, at most as many as a vector has lanes."""
    args, v = call.args, Vectors(target)
    (_, heads, p), (_, groups, n) = args["x"].shape, args["B"].shape
    if not recurrent(call, "ssm_state"):
        return []
    types = {name: DTYPES[args[name].dtype] for name in ("x", "dt", "A", "B", "C", "D", "dt_bias") if args[name] is not None}
    rows, group = divisor(p, v.lanes), f"head // {heads // groups}"
    step = v.load_one(types["dt"], row(call, "dt", "t", "head"))
    if "dt_bias" in types:
        step += f" + {v.load_one(types['dt_bias'], 'dt_bias[head]')}"
    if args["softplus"]:
        step = v.first(v.call("softplus", v.splat(step)))
    if args["dt_min"] > -math.inf:
        step = f"T.max({step}, T.float32({args['dt_min']!r}))"
    if args["dt_max"] < math.inf:
        step = f"T.min({step}, T.float32({args['dt_max']!r}))"
    x = v.load(types["x"], row(call, "x", "t", "head", "first"), str(rows))
    y = f"{_sums(v, rows)} + {v.splat(v.load_one(types['D'], 'D[head]'))} * now" if "D" in types else _sums(v, rows)

    def advance(k: str, count: str | None) -> list[str]:
        return [
            f"b: T.let = {v.load(types['B'], row(call, 'B', 't', group, k), count)}",
            f"c: T.let = {v.load(types['C'], row(call, 'C', 't', group, k), count)}",
            *_advance(v, rows, lambda r: f"ssm_state[slot, head, first + {r}, {k}]", lambda r: "decay", count),
        ]

    body = walk(
        steps, call, heads * (p // rows), rows * max(n // 8, 2),
        local=f"""
            head: T.let = unit // {p // rows}
            first: T.let = unit % {p // rows} * {rows}
        """ + _LOCAL.format(lanes=v.lanes, type=v.type),
        first=_clear(v, rows, n, "ssm_state[slot, head, first + r, "),
        token=f"""
            step: T.let = {step}
            decay: T.let = {v.call("exp", v.splat(f"step * {v.load_one(types['A'], 'A[head]')}"))}
            now: T.let = {x}
            {v.store("float32", "entering[0]", f"now * {v.splat('step')}")}
        """ + _over_state(v, rows, n, advance) + f"\n            {v.store('float32', 'y[t, head, first]', y, str(rows))}",
        zero=v.store("float32", "y[t, head, first]", v.splat(0.0), str(rows)),
    )  # fmt: skip
    return [candidate(v, call, "ssm_state", body, ("x", "dt", "B", "C"))]


@claims("selective_scan", "tvm")
def selective_scan(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """A task is a few channels, at most as many as a vector has lanes."""
    args, v = call.args, Vectors(target)
    channels, n = args["A"].shape
    if not recurrent(call, "ssm_state"):
        return []
    types = {name: DTYPES[args[name].dtype] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias") if args[name] is not None}
    rows = divisor(channels, v.lanes)
    step = v.load(types["dt"], row(call, "dt", "t", "first"), str(rows))
    if "dt_bias" in types:
        step += f" + {v.load(types['dt_bias'], 'dt_bias[first]', str(rows))}"
    if args["softplus"]:
        step = v.call("softplus", step)
    y = f"{_sums(v, rows)} + {v.load(types['D'], 'D[first]', str(rows))} * now" if "D" in types else _sums(v, rows)
    if "z" in types:
        y = f"({y}) * {v.call('silu', v.load(types['z'], row(call, 'z', 't', 'first'), str(rows)))}"

    def advance(k: str, count: str | None) -> list[str]:
        def decay(r: int) -> str:
            return v.call("exp", f"{v.splat(f'steps[{r}]')} * {v.load(types['A'], f'A[first + {r}, {k}]', count)}")

        return [
            f"b: T.let = {v.load(types['B'], row(call, 'B', 't', k), count)}",
            f"c: T.let = {v.load(types['C'], row(call, 'C', 't', k), count)}",
            *_advance(v, rows, lambda r: f"ssm_state[slot, first + {r}, {k}]", decay, count),
        ]

    body = walk(
        steps, call, channels // rows, rows * max(n, 8),
        local=f"""
            first: T.let = unit * {rows}
            steps = T.alloc_buffer(({v.lanes},), "float32", scope="global")
        """ + _LOCAL.format(lanes=v.lanes, type=v.type),
        first=_clear(v, rows, n, "ssm_state[slot, first + r, "),
        token=f"""
            step: T.let = {step}
            now: T.let = {v.load(types["x"], row(call, "x", "t", "first"), str(rows))}
            {v.store("float32", "steps[0]", "step")}
            {v.store("float32", "entering[0]", "now * step")}
        """ + _over_state(v, rows, n, advance) + f"\n            {v.store(types['x'], 'y[t, first]', y, str(rows))}",
        zero=v.store(types["x"], "y[t, first]", v.splat(0.0), str(rows)),
    )  # fmt: skip
    return [candidate(v, call, "ssm_state", body, ("x", "dt", "B", "C", "z"))]


# `entering`: what each row's new element of the state is multiplied with; `sums`: of each row, a vector that adds up to its result.
_LOCAL = """
            entering = T.alloc_buffer(({lanes},), "float32", scope="global")
            sums0 = T.alloc_buffer((8,), "{type}", scope="global")
            sums1 = T.alloc_buffer((8,), "{type}", scope="global")
"""


def _sums(v: Vectors, rows: int) -> str:
    """Lane r is the result of row r."""
    return v.call("sums", *(f"sums{r // 8}[{r % 8}]" if r < rows else v.splat(0.0) for r in range(v.lanes)))


def _over_state(v: Vectors, rows: int, n: int, advance: Callable[[str, str | None], list[str]]) -> str:
    """The loop over the elements of all rows, by vectors."""
    reset = "\n".join(f"sums{r // 8}[{r % 8}] = {v.splat(0.0)}" for r in range(rows))
    return "\n" + indent(f"{reset}\n{v.over(n, advance, 0)}", "            ")


def _advance(v: Vectors, rows: int, here: Callable[[int], str], decay: Callable[[int], str], count: str | None) -> list[str]:
    """h ← decay · h + entering · b, and h · c added to the sums, for each row."""
    found = []
    for r in range(rows):
        found += [
            f"h{r}: T.let = {v.load('float32', here(r), count)} * {decay(r)} + {v.splat(f'entering[{r}]')} * b",
            v.store("float32", here(r), f"h{r}", count),
            f"sums{r // 8}[{r % 8}] = sums{r // 8}[{r % 8}] + h{r} * c",
        ]
    return found


def _clear(v: Vectors, rows: int, n: int, state: str) -> str:
    return f"for r in T.serial({rows}):\n{v.over(n, lambda k, count: [v.store('float32', f'{state}{k}]', v.splat(0.0), count)], 1)}"
