"""The delta rule and channel-wise recurrences: a task owns columns of a sequence's state, vectors of which walk its tokens together."""

from __future__ import annotations

from ..kernel import Call, Candidate, Steps, claims
from ..target import Target
from .sequences import candidate, recurrent, row, walk
from .vector import DTYPES, Vectors

LARGEST_KEY = 256
"""Keys of a task are on its stack, which TVM leaves to buffers of up to 1 KiB."""


@claims("gated_delta_rule", "tvm")
def gated_delta_rule(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """A task is some columns of a head. The decayed state is read for Sᵀk and Sᵀq together, then written with what the token adds."""
    args, v = call.args, Vectors(target)
    (_, keys, e), (_, heads, f) = args["k"].shape, args["v"].shape
    if not recurrent(call, "delta_state") or e > LARGEST_KEY:
        return []
    types = {n: DTYPES[args[n].dtype] for n in ("q", "k", "v", "g", "beta")}
    wide = next(m for m in (4, 2, 1) if m == 1 or f % (m * v.lanes) == 0)
    blocks, partial = -(-f // (wide * v.lanes)), "count" if f % v.lanes else None
    columns, channels = range(wide), len(args["g"].shape) == 3
    key = f"head // {heads // keys}"

    def part(m: int) -> str:
        return f"column + {m * v.lanes}"

    def squares(k: str, count: str | None) -> list[str]:
        return [
            f"query: T.let = {v.load(types['q'], row(call, 'q', 't', key, k), count)}",
            f"tie: T.let = {v.load(types['k'], row(call, 'k', 't', key, k), count)}",
            "totals[0] = totals[0] + query * query",
            "totals[1] = totals[1] + tie * tie",
        ]

    def scaled(k: str, count: str | None) -> list[str]:
        query, tie = (f"{v.load(types[n], row(call, n, 't', key, k), count)} * {v.splat(f'scales[{i}]')}" for i, n in enumerate("qk"))
        decay = v.call(
            "exp", v.load(types["g"], row(call, "g", "t", "head", k), count) if channels else v.splat(v.load_one(types["g"], row(call, "g", "t", "head")))
        )
        return [
            v.store("float32", f"queries[{k}]", query, count),
            v.store("float32", f"ties[{k}]", tie, count),
            *([v.store("float32", f"decays[{k}]", decay, count)] if channels else []),
            f"totals[2] = totals[2] + {v.load('float32', f'queries[{k}]', count)} * {v.load('float32', f'ties[{k}]', count)}",
        ]

    scales = [f"scales[0] = T.float32({e**-0.5!r})", "scales[1] = T.float32(1)"]
    if (eps := args["eps"]) > 0:
        inverse = [f"T.float32(1) / T.sqrt({v.sum(f'totals[{i}]')} + T.float32({eps!r}))" for i in range(2)]
        scales = [v.over(e, squares, 0), f"scales[0] = {inverse[0]} * T.float32({e**-0.5!r})", f"scales[1] = {inverse[1]}"]
    decay = "decays[i]" if channels else "decay"
    state = [f"delta_state[slot, head, i, {part(m)}]" for m in columns]
    load, ties = lambda s: v.load("float32", s, partial), v.splat("ties[i]")
    token = [
        *(f"totals[{i}] = {v.splat(0.0)}" for i in range(3)),
        *scales,
        v.over(e, scaled, 0),
        *([] if channels else [f"decay: T.let = {v.first(v.call('exp', v.splat(v.load_one(types['g'], row(call, 'g', 't', 'head')))))}"]),
        *(f"{name}[{m}] = {v.splat(0.0)}" for name in ("old", "out") for m in columns),
        f"for i in T.serial({e}):",
        *(
            line
            for m in columns
            for line in (
                f"    kept{m}: T.let = {load(state[m])} * {v.splat(decay)}",
                f"    old[{m}] = old[{m}] + kept{m} * {ties}",
                f"    out[{m}] = out[{m}] + kept{m} * {v.splat('queries[i]')}",
            )
        ),
        f"both: T.let = {v.sum('totals[2]')}",
        f"beta_t: T.let = {v.load_one(types['beta'], row(call, 'beta', 't', 'head'))}",
        *(f"old[{m}] = ({v.load(types['v'], row(call, 'v', 't', 'head', part(m)), partial)} - old[{m}]) * {v.splat('beta_t')}" for m in columns),
        *(v.store(types["v"], f"y[t, head, {part(m)}]", f"out[{m}] + old[{m}] * {v.splat('both')}", partial) for m in columns),
        f"for i in T.serial({e}):",
        *(f"    {v.store('float32', s, f'{load(s)} * {v.splat(decay)} + old[{m}] * {ties}', partial)}" for m, s in enumerate(state)),
    ]
    local = [
        f"head: T.let = unit // {blocks}",
        f"column: T.let = unit % {blocks} * {wide * v.lanes}",
        f"count: T.let = T.min({v.lanes}, {f} - column)",
        *(f'{name} = T.alloc_buffer(({e},), "float32", scope="global")' for name in ("queries", "ties", *(["decays"] if channels else []))),
        'scales = T.alloc_buffer((2,), "float32", scope="global")',
        f'totals = T.alloc_buffer((3,), "{v.type}", scope="global")',
        *(f'{name} = T.alloc_buffer(({wide},), "{v.type}", scope="global")' for name in ("old", "out")),
    ]
    clear = [f"for i in T.serial({e}):", *(f"    {v.store('float32', s, v.splat(0.0), partial)}" for s in state)]
    zero = [v.store(types["v"], f"y[t, head, {part(m)}]", v.splat(0.0), partial) for m in columns]
    body = walk(
        steps, call, heads * blocks, e * wide * 4, local="\n".join(local), first="\n".join(clear), token="\n".join(token), zero="\n".join(zero)
    )  # fmt: skip
    return [candidate(v, call, "delta_state", body, ("q", "k", "v", "g", "beta"))]


@claims("linear_recurrence", "tvm")
def linear_recurrence(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args, v = call.args, Vectors(target)
    if not recurrent(call, "lru_state"):
        return []
    x, decay = (DTYPES[args[n].dtype] for n in ("x", "decay"))
    body = _channels(
        v, steps, call, ["lru_state[slot, c]"], [0.0], 2,
        f"""
            held[0] = {v.load(decay, row(call, "decay", "t", "c"), "count")} * held[0] + {v.load(x, row(call, "x", "t", "c"), "count")}
            {v.store(x, "y[t, c]", "held[0]", "count")}
        """,
        v.store(x, "y[t, c]", v.splat(0.0), "count"),
    )  # fmt: skip
    return [candidate(v, call, "lru_state", body, ("x", "decay"))]


@claims("wkv", "tvm")
def wkv(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args, v = call.args, Vectors(target)
    if not recurrent(call, "wkv_state"):
        return []
    k, value, w, u = (DTYPES[args[n].dtype] for n in ("k", "v", "log_decay", "bonus"))
    body = _channels(
        v, steps, call, [f"wkv_state[slot, {i}, c]" for i in range(3)], [0.0, 0.0, -1e38], 32,
        f"""
            key: T.let = {v.load(k, row(call, "k", "t", "c"), "count")}
            value: T.let = {v.load(value, row(call, "v", "t", "c"), "count")}
            boosted: T.let = key + {v.load(u, "bonus[c]", "count")}
            now: T.let = T.max(held[2], boosted)
            before: T.let = {v.call("exp", "held[2] - now")}
            weight: T.let = {v.call("exp", "boosted - now")}
            {v.store(k, "y[t, c]", "(before * held[0] + weight * value) / (before * held[1] + weight)", "count")}
            faded: T.let = held[2] + {v.load(w, "log_decay[c]", "count")}
            later: T.let = T.max(faded, key)
            kept: T.let = {v.call("exp", "faded - later")}
            added: T.let = {v.call("exp", "key - later")}
            held[0] = kept * held[0] + added * value
            held[1] = kept * held[1] + added
            held[2] = later
        """,
        v.store(k, "y[t, c]", v.splat(0.0), "count"),
    )  # fmt: skip
    return [candidate(v, call, "wkv_state", body, ("k", "v"))]


def _channels(v: Vectors, steps: Steps, call: Call, state: list[str], fresh: list[float], cost: int, token: str, zero: str) -> str:
    """A task is a vector of channels, whose state is in the registers `held` from the first token to the last."""
    (channels,) = call.results[0].shape[1:]
    assert isinstance(channels, int)
    return walk(
        steps, call, -(-channels // v.lanes), cost * v.lanes,
        local=f"""
            c: T.let = unit * {v.lanes}
            count: T.let = T.min({v.lanes}, {channels} - c)
            held = T.alloc_buffer(({len(state)},), "{v.type}", scope="global")
        """,
        start="\n".join([
            *(f"held[{i}] = {v.load('float32', s, 'count')}" for i, s in enumerate(state)),
            "if seq_lens[s] == end - begin:",
            *(f"    held[{i}] = {v.splat(x)}" for i, x in enumerate(fresh)),
        ]),
        token=token,
        finish="\n".join(v.store("float32", s, f"held[{i}]", "count") for i, s in enumerate(state)),
        zero=zero,
    )  # fmt: skip
