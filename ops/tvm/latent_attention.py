"""Multi-head latent attention: what `attention.py` does, with one cache whose rows are keys and values of all heads, and lists of positions.

A task is a block of tokens × a share of the pages, so that a cached token, read from memory once, meets all heads of all these tokens. Of a
decode step the floor is 2(L + R) bytes a cached token, or 2(L + R) + 2L flops a head: at L = 512, R = 64 and 16 heads 30 flops a byte, more than a core
computes in the time that a byte takes.
"""

from __future__ import annotations

from dataclasses import replace
from textwrap import indent

import torch

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..target import Target
from .attention import TASKS, Attention, shares
from .rotary import Rotation
from .vector import DTYPES, Buffer, Vectors, numbers, parallel

HIDDEN = -3e38
"""Added to the score of a place that no position has: behind the maximum over no scores too."""


@claims("mla_attention", "tvm")
def mla_attention(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    options = [n for n in ("sinks",) if args[n] is not None]
    indices = [n for n in ("cu_seqlens_q", "seq_lens", "page_table", "indices") if args[n] is not None]
    if args["q_latent"].dtype not in DTYPES or not args["q_latent"].dtype == args["q_rope"].dtype == args["latent_cache"].dtype:
        return []
    if any(args[n].dtype != torch.int32 for n in indices) or any(args[n].dtype not in DTYPES for n in options):
        return []
    listed = args["indices"] is not None
    block, splits = shares(replace(steps, max_num_new=1) if listed else steps, target, 1)
    kernel = (_Listed if listed else _Latent)(Vectors(target), call, steps, options, [], block, splits)
    scratch = Tensor(torch.float32, ({"T": splits}, kernel.heads, kernel.state_width))
    names = [*kernel.queries, "latent_cache", *indices[:3], *options, *indices[3:]]
    launch = Launch(Source(call.op, "tvm", call.op, kernel.text()), (*(Operand(arg=n) for n in names), Operand(scratch=0), Operand(out=0)))
    return [Candidate(f"split{splits}_block{block}", (launch,), (scratch,))]


class _Latent(Attention):
    @property
    def caches(self) -> tuple[str, str]:
        return "latent_cache", "latent_cache"

    @property
    def queries(self) -> tuple[str, ...]:
        return ("q_latent", "q_rope") if self.call.args["q_rope"].shape[2] else ("q_latent",)


class _Listed(_Latent):
    """A task takes a token and a share of its list, by as many positions as a vector has lanes."""

    @property
    def more_buffers(self) -> list[Buffer]:
        return [("indices", "int32", ("tokens", *numbers(self.call.args["indices"].shape[1:])))]

    def _element(self, name: str, number: str, k: str) -> str:
        return f"{name}[page_of[{number}], 0, offset_of[{number}], {k}]"

    def _place(self, begin: str) -> list[str]:
        return []

    def _seen(self, count: int) -> str:
        return f"scores + {self.vectors.load('float32', 'hidden[0]')}"

    def _gather(self) -> str:
        lanes, page_size, topk = self.vectors.lanes, self.cache.shape[2], self.call.args["indices"].shape[1]
        turns = -(-topk // lanes)
        window = self.call.args["window"]
        seen = "listed >= 0 and listed <= position" + (f" and listed > position - {window}" if window else "")
        return f"""
for task in T.parallel({self.splits} * tokens):
    share: T.let = task // tokens
    t: T.let = task % tokens
    begin: T.let = t
    head: T.let = 0
    for row in T.serial({self.heads}):
        for k in T.serial({self.state_width // lanes}):
            {self.reset}
{indent(sequence_of("t"), "    ")}
    if position >= 0:
        page_of = T.alloc_buffer(({lanes},), "int64", scope="global")
        offset_of = T.alloc_buffer(({lanes},), "int32", scope="global")
        hidden = T.alloc_buffer(({lanes},), "float32", scope="global")
        some = T.alloc_buffer((1,), "int32", scope="global")
        for turn in T.serial({-(-turns // self.splits)}):
            some[0] = 0
            for j in T.serial({lanes}):
                place: T.let = (share * {-(-turns // self.splits)} + turn) * {lanes} + j
                listed: T.let = T.if_then_else(place < {topk}, indices[t, T.min(place, {topk - 1})], -1)
                there: T.let = T.if_then_else({seen}, 1, 0)
                number: T.let = T.if_then_else(there == 1, listed, position)
                page_of[j] = T.cast(page_table[seq[0], number // {page_size}], "int64")
                offset_of[j] = number % {page_size}
                hidden[j] = T.if_then_else(there == 1, T.float32(0), T.float32({HIDDEN}))
                some[0] = some[0] + there
            if some[0] > 0:
                for row in T.serial({self.heads // self.rows}):
                    first_head: T.let = row * {self.rows}
{indent(self._cached("0", lanes), " " * 20)}
"""


def sequence_of(t: str) -> str:
    """Statements after which `seq[0]` is the sequence of token `t` and `position` its position, −1 if no sequence has it."""
    return f"""
seq = T.alloc_buffer((1,), "int32", scope="global")
seq[0] = 0
while seq[0] < seqs - 1 and cu_seqlens_q[seq[0] + 1] <= {t}:
    seq[0] = seq[0] + 1
within: T.let = {t} < cu_seqlens_q[seq[0] + 1] and seq_lens[seq[0]] > 0
position: T.let = T.if_then_else(within, seq_lens[seq[0]] - cu_seqlens_q[seq[0] + 1] + {t}, -1)
"""


@claims("latent_write", "tvm")
def latent_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    latent, latent_cache = call.args["latent"], call.args["latent_cache"]
    parts = [n for n in ("latent", "rope") if call.args[n] is not None]
    if any(call.args[n].dtype not in DTYPES for n in (*parts, "latent_cache")) or call.args["slot_mapping"].dtype != torch.int32:
        return []
    v, page_size = Vectors(target), latent_cache.shape[2]
    copies, offset = [], 0
    for n in parts:
        (size,) = numbers(call.args[n].shape[1:])

        def copy(k: str, count: str | None, n: str = n, offset: int = offset) -> list[str]:
            value = v.load(DTYPES[call.args[n].dtype], f"{n}[t, {k}]", count)
            return [v.store(DTYPES[latent_cache.dtype], f"latent_cache[page, 0, row, {offset} + {k}]", value, count)]

        copies.append(v.over(size, copy, 2))
        offset += size
    body = "\n".join([
        f"for t in {parallel(steps, latent)}(tokens):",
        "    if slot_mapping[t] >= 0:",
        f'        page: T.let = T.cast(slot_mapping[t] // {page_size}, "int64")',
        f"        row: T.let = slot_mapping[t] % {page_size}",
        *copies,
    ])  # fmt: skip
    buffers: list[Buffer] = [(n, DTYPES[call.args[n].dtype], ("tokens", *numbers(call.args[n].shape[1:]))) for n in parts]
    buffers += [("latent_cache", DTYPES[latent_cache.dtype], ("pages", *numbers(latent_cache.shape[1:]))), ("slot_mapping", "int32", ("tokens",))]
    operands = tuple(Operand(arg=n) for n in (*parts, "latent_cache", "slot_mapping"))
    return [Candidate("tokens", (Launch(Source(call.op, "tvm", call.op, v.script(call.op, buffers, body)), operands),))]


@claims("latent_rope_write", "tvm")
def latent_rope_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args, names = call.args, ("q", "kv", "cos", "sin", "weight", "latent_cache")
    if any(args[n].dtype not in DTYPES for n in names) or args["cos"].dtype != args["sin"].dtype or args["slot_mapping"].dtype != torch.int32:
        return []
    v, page_size = Vectors(target), args["latent_cache"].shape[2]
    types = {n: DTYPES[args[n].dtype] for n in names}
    (heads, nope), (r,), (size,) = numbers(call.results[0].shape[1:]), numbers(call.results[1].shape[2:]), numbers(args["weight"].shape)
    rotate = Rotation.of(v, args["style"], args["cos"])
    first, last = (f"q[t, {begin} + head * {step} + " for begin, step in (args["straight"], args["turned"]))
    latent = f"kv[t, {args['kv_begin']} + "
    offset = f" + {v.splat(args['offset'])}" if args["offset"] else ""

    def square(k: str, count: str | None) -> list[str]:
        return [f"element: T.let = {v.load(types['kv'], f'{latent}{k}]', count)}", "squares[0] = squares[0] + element * element"]

    def normalized(k: str, count: str | None) -> list[str]:
        element = f"{v.load(types['kv'], f'{latent}{k}]', count)} * {v.splat('scale')} * ({v.load(types['weight'], f'weight[{k}]', count)}{offset})"
        return [v.store(types["latent_cache"], f"latent_cache[page, 0, row, {k}]", element, count)]

    def turned(source: str, dtype: str, to: str, to_dtype: str, depth: int) -> str:
        return rotate(lambda k, n: v.load(dtype, f"{source}{k}]", n), lambda k, value, n: v.store(to_dtype, f"{to}{k}]", value, n), r, depth)

    def straight(k: str, count: str | None) -> list[str]:
        return [v.store(types["q"], f"straight[t, head, {k}]", v.load(types["q"], f"{first}{k}]", count), count)]

    body = f"""
for t in {parallel(steps, args["q"])}(tokens):
    for head in T.serial({heads}):
{v.over(nope, straight, 2)}
{turned(last, types["q"], "turned[t, head, ", types["q"], 2)}
    if slot_mapping[t] >= 0:
        page: T.let = T.cast(slot_mapping[t] // {page_size}, "int64")
        row: T.let = slot_mapping[t] % {page_size}
        squares = T.alloc_buffer((1,), "{v.type}", scope="global")
        squares[0] = {v.splat(0.0)}
{v.over(size, square, 2)}
        scale: T.let = T.float32(1) / T.sqrt({v.sum("squares[0]")} / T.float32({size}) + T.float32({args["eps"]!r}))
{v.over(size, normalized, 2)}
{turned(f"{latent}{size} + ", types["kv"], f"latent_cache[page, 0, row, {size} + ", types["latent_cache"], 2)}
"""
    buffers: list[Buffer] = [(n, types[n], ("tokens", *numbers(args[n].shape[1:]))) for n in names[:4]]
    buffers += [("weight", types["weight"], (size,)), ("latent_cache", types["latent_cache"], ("pages", *numbers(args["latent_cache"].shape[1:])))]
    buffers += [("slot_mapping", "int32", ("tokens",)), ("straight", types["q"], ("tokens", heads, nope)), ("turned", types["q"], ("tokens", heads, r))]
    operands = (*(Operand(arg=n) for n in (*names, "slot_mapping")), Operand(out=0), Operand(out=1))
    return [Candidate("tokens", (Launch(Source(call.op, "tvm", call.op, v.script(call.op, buffers, body)), operands),))]


@claims("sparse_index", "tvm")
def sparse_index(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    """A task takes every n-th token. It lists what scores above the least of the best so far, and when the list is full, keeps the best of it."""
    args, v = call.args, Vectors(target)
    q, weights, cache = args["q"], args["weights"], args["index_cache"]
    if any(t.dtype not in DTYPES for t in (q, weights)) or q.dtype != cache.dtype:
        return []
    if any(args[n].dtype != torch.int32 for n in ("cu_seqlens_q", "seq_lens", "page_table")):
        return []
    (j, d), topk, lanes, page_size = numbers(q.shape[1:]), args["topk"], v.lanes, cache.shape[2]
    tasks = target.num_threads or TASKS
    size, step, dtype = topk + max(topk, lanes), v.step(DTYPES[q.dtype]), DTYPES[q.dtype]
    dots = [f"dots{i // 8}[{i % 8}]" for i in range(lanes)]

    def products(k: str, part: str | None) -> list[str]:
        return [f"{dot} = {v.dot(dtype, dot, f'q[t, joint, {k}]', f'index_cache[page_of[{i}], 0, offset_of[{i}], {k}]', part)}" for i, dot in enumerate(dots)]

    multiplied = [f"for k in T.serial({d // step}):", *("    " + p for p in products(f"k * {step}", None))] if d >= step else []
    multiplied += products(str(d // step * step), str(d % step)) if d % step else []
    product = f"{v.call('sums', *dots)} * {v.splat(args['scale'])}"
    weighted = f"T.max({product}, {v.splat(0.0)}) * {v.splat(v.load_one(DTYPES[weights.dtype], 'weights[t, joint]'))}"
    score = [
        f"for joint in T.serial({j}):",
        *(f'    dots{g} = T.alloc_buffer((8,), "{v.type}", scope="global")' for g in range(lanes // 8)),
        *(f"    {dot} = {v.splat(0.0)}" for dot in dots),
        *("    " + line for line in multiplied),
        f"    score[0] = score[0] + {weighted}",
    ]
    # the integer of a float32 that orders like it
    key = "T.if_then_else(bits >= 0, bits, T.bitwise_xor(bits, 2147483647))"
    prune = f"""
more[0] = 0
for e in T.serial(count[0]):
    more[0] = more[0] + T.if_then_else(keys[task, e] >= 0, 1, 0)
least[0] = T.if_then_else(more[0] >= {topk}, 0, -2147483647 - 1)
for bit in T.serial(31):
    probe: T.let = least[0] + T.shift_left(1, 30 - bit)
    more[0] = 0
    for e in T.serial(count[0]):
        more[0] = more[0] + T.if_then_else(keys[task, e] >= probe, 1, 0)
    if more[0] >= {topk}:
        least[0] = probe
more[0] = 0
for e in T.serial(count[0]):
    more[0] = more[0] + T.if_then_else(keys[task, e] > least[0], 1, 0)
same[0] = {topk} - more[0]
more[0] = 0
for e in T.serial(count[0]):
    here: T.let = keys[task, e]
    if here > least[0] or (here == least[0] and same[0] > 0):
        if here == least[0]:
            same[0] = same[0] - 1
        keys[task, more[0]] = here
        places[task, more[0]] = places[task, e]
        more[0] = more[0] + 1
count[0] = more[0]
"""
    scalars = "\n".join(f'    {n} = T.alloc_buffer((1,), "int32", scope="global")' for n in ("count", "least", "more", "same"))
    body = f"""
for task in T.parallel({tasks}):
{scalars}
    page_of = T.alloc_buffer(({lanes},), "int64", scope="global")
    offset_of = T.alloc_buffer(({lanes},), "int32", scope="global")
    scores = T.alloc_buffer(({lanes},), "float32", scope="global")
    score = T.alloc_buffer((1,), "{v.type}", scope="global")
    for turn in T.serial((tokens - task + {tasks - 1}) // {tasks}):
        t: T.let = task + turn * {tasks}
{indent(sequence_of("t"), "        ")}
        count[0] = 0
        least[0] = -2147483647 - 1
        if position < {topk}:
            for e in T.serial({topk}):
                chosen[t, e] = T.if_then_else(e <= position, e, -1)
        else:
            for block in T.serial((position + {lanes}) // {lanes}):
                for i in T.serial({lanes}):
                    number: T.let = T.min(block * {lanes} + i, position)
                    page_of[i] = T.cast(page_table[seq[0], number // {page_size}], "int64")
                    offset_of[i] = number % {page_size}
                score[0] = {v.splat(0.0)}
{indent(chr(10).join(score), " " * 16)}
                {v.store("float32", "scores[0]", "score[0]")}
                for i in T.serial({lanes}):
                    bits: T.let = T.reinterpret("int32", scores[i] + T.float32(0))
                    key: T.let = T.max({key}, -2147483647)
                    if block * {lanes} + i <= position and key > least[0]:
                        keys[task, count[0]] = key
                        places[task, count[0]] = block * {lanes} + i
                        count[0] = count[0] + 1
                if count[0] > {size - lanes}:
{indent(prune, " " * 20)}
{indent(prune, " " * 12)}
            for e in T.serial({topk}):
                chosen[t, e] = places[task, e]
"""
    buffers: list[Buffer] = [
        ("q", dtype, ("tokens", j, d)), ("weights", DTYPES[weights.dtype], ("tokens", j)), ("index_cache", dtype, ("pages", *numbers(cache.shape[1:]))),
        ("cu_seqlens_q", "int32", ("starts",)), ("seq_lens", "int32", ("seqs",)), ("page_table", "int32", ("seqs", "table_width")),
        ("keys", "int32", (tasks, size)), ("places", "int32", (tasks, size)), ("chosen", "int32", ("tokens", topk)),
    ]  # fmt: skip
    given = tuple(Operand(arg=n) for n in ("q", "weights", "index_cache", "cu_seqlens_q", "seq_lens", "page_table"))
    launch = Launch(Source(call.op, "tvm", call.op, v.script(call.op, buffers, body)), (*given, Operand(scratch=0), Operand(scratch=1), Operand(out=0)))
    return [Candidate(f"tasks{tasks}", (launch,), (Tensor(torch.int32, (tasks, size)),) * 2)]
