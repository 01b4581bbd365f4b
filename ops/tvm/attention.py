"""Paged attention with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022), the pages split between tasks
where there are few sequences (Dao et al. 2023, Flash-Decoding).

A task is a block of tokens × a kv head × a share of the pages. It takes its sequences one after the other, and of each the
pages that its tokens see; a page, read from memory once, meets all query heads of all these tokens. What each (share,
token, head) has gathered so far lies in scratch: F weighted sums, then the running maximum and the sum of exponentials,
each as a vector. A second loop joins the shares. Scales of a quantized cache multiply scores and weights, sixteen tokens at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import indent

import torch

from ..kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, claims
from ..quantize import LARGEST
from ..target import Target
from .vector import BYTES, CACHE_DTYPES, DTYPES, Vectors, cache_operand

BLOCK = 16
"""Tokens of a task when sequences bring many: they share what is read of a page."""
TASKS = 16
"""Fewer tasks than this would leave threads idle: then pages are split."""
LARGEST_GROUP = 8
"""Query heads that share a load of v; each holds an accumulator."""
NOTHING = -1e30
"""The maximum over no scores: finite, so that its difference to itself is 0."""


@claims("paged_attention", "tvm")
def paged_attention(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    q, k_cache, v_cache = call.args["q"], call.args["k_cache"], call.args["v_cache"]
    options = [n for n in ("sinks", "alibi_slopes") if call.args[n] is not None]
    indices = ("cu_seqlens_q", "seq_lens", "page_table")
    scales = [n for n in ("k_scale", "v_scale") if call.args[n] is not None]
    held = {q.dtype} if not scales else set(LARGEST)
    if q.dtype not in DTYPES or not {k_cache.dtype, v_cache.dtype} <= held or any(call.args[n].dtype != torch.int32 for n in indices):
        return []
    if any(call.args[n].dtype not in DTYPES for n in options):
        return []
    block = 1 if steps.max_num_new == 1 else max(1, min(BLOCK, steps.max_tokens // 4))
    tasks = k_cache.shape[1] * -(-steps.max_tokens // block)
    splits = max(1, min(8, (2 * target.num_threads or TASKS) // tasks))
    kernel = _Attention(Vectors(target), call, steps, options, scales, block, splits)
    scratch = Tensor(torch.float32, ({"T": splits}, q.shape[1], kernel.state_width))
    caches = [cache_operand(call, n) for n in ("k_cache", "v_cache")]
    operands = [Operand(arg="q"), *caches, *(Operand(arg=n) for n in (*scales, *indices, *options)), Operand(scratch=0), Operand(out=0)]
    launch = Launch(Source("paged_attention", "tvm", "paged_attention", kernel.text()), tuple(operands))
    return [Candidate(f"split{splits}_block{block}", (launch,), (scratch,))]


@dataclass(frozen=True)
class _Attention:
    vectors: Vectors
    call: Call
    steps: Steps
    options: list[str]
    scales: list[str]
    block: int
    splits: int

    @property
    def dtype(self) -> str:
        return DTYPES[self.call.args["q"].dtype]

    @property
    def cache_dtype(self) -> str:
        return CACHE_DTYPES[self.call.args["k_cache"].dtype]

    @property
    def sums_width(self) -> int:
        """F, rounded up to whole vectors."""
        return -(-self.call.args["v_cache"].shape[3] // self.vectors.lanes) * self.vectors.lanes

    @property
    def state_width(self) -> int:
        return self.sums_width + 2 * self.vectors.lanes

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.call.args["q"].shape[1] // self.call.args["k_cache"].shape[1]

    @property
    def rows(self) -> int:
        """How many of them are computed together."""
        return max(r for r in range(1, LARGEST_GROUP + 1) if self.group % r == 0)

    def text(self) -> str:
        q, k_cache, v_cache = (self.call.args[n] for n in ("q", "k_cache", "v_cache"))
        tokens, heads = "tokens", q.shape[1]
        buffers = [
            ("q", self.dtype, (tokens, heads, q.shape[2])),
            ("k_cache", self.cache_dtype, ("pages", *k_cache.shape[1:])),
            ("v_cache", self.cache_dtype, ("pages", *v_cache.shape[1:])),
            *((n, "float32", ("pages", *k_cache.shape[1:3])) for n in self.scales),
            ("cu_seqlens_q", "int32", ("starts",)),
            ("seq_lens", "int32", ("seqs",)),
            ("page_table", "int32", ("seqs", "table_width")),
            *((n, DTYPES[self.call.args[n].dtype], (heads,)) for n in self.options),
            ("state", "float32", ("shares", heads, self.state_width)),
            ("y", self.dtype, (tokens, heads, v_cache.shape[3])),
        ]
        return self.vectors.script("paged_attention", buffers, self._gather() + self._join())

    def _gather(self) -> str:
        """The parallel loop over tasks."""
        kv_heads, page_size = self.call.args["k_cache"].shape[1:3]
        window, chunk = self.call.args["window"], self.call.args["chunk"]
        lanes = self.vectors.lanes
        here = f"state[share * tokens + begin + row // {self.group}, head * {self.group} + row % {self.group}, k * {lanes}]"
        reset = self.vectors.store("float32", here, self.vectors.splat(f"T.if_then_else(k == {self.sums_width // lanes}, T.float32({NOTHING}), T.float32(0))"))
        # Blocks of one head are neighbours: static shares of the heads are even where causal blocks are not.
        return f"""
blocks: T.let = (tokens + {self.block - 1}) // {self.block}
for task in T.parallel({self.splits * kv_heads} * blocks):
    share: T.let = task // ({kv_heads} * blocks)
    head: T.let = task // blocks % {kv_heads}
    begin: T.let = task % blocks * {self.block}
    end: T.let = T.min(begin + {self.block}, tokens)
    for row in T.serial((end - begin) * {self.group}):
        for k in T.serial({self.state_width // lanes}):
            {reset}
    token = T.alloc_buffer((1,), "int32", scope="global")
    seq = T.alloc_buffer((1,), "int32", scope="global")
    token[0] = begin
    seq[0] = 0
    while token[0] < T.min(end, cu_seqlens_q[seqs]):
        while cu_seqlens_q[seq[0] + 1] <= token[0]:
            seq[0] = seq[0] + 1
        start: T.let = token[0]
        stop: T.let = T.min(end, cu_seqlens_q[seq[0] + 1])
        if seq_lens[seq[0]] > 0:
            to_position: T.let = seq_lens[seq[0]] - cu_seqlens_q[seq[0] + 1]
            first_page: T.let = {self._first_seen("start + to_position", window, chunk)} // {page_size}
            num_pages: T.let = (stop - 1 + to_position) // {page_size} + 1 - first_page
            num_shared: T.let = (num_pages + {self.splits - 1}) // {self.splits}
            for turn in T.serial(T.max(0, T.min(num_shared, num_pages - share * num_shared))):
                page_number: T.let = first_page + share * num_shared + turn
                page: T.let = T.cast(page_table[seq[0], page_number], "int64")
{self._prefetch()}
                for row in T.serial((stop - start) * {self.group // self.rows}):
                    t: T.let = start + row // {self.group // self.rows}
                    first_head: T.let = head * {self.group} + row % {self.group // self.rows} * {self.rows}
                    position: T.let = t + to_position
{indent(self._page(), " " * 20)}
        token[0] = stop
"""

    def _prefetch(self) -> str:
        """Ask for the next page: pages lie apart, so the hardware's prefetcher begins anew with each."""
        lines = ['                next_page: T.let = T.cast(page_table[seq[0], T.min(page_number + 1, table_width - 1)], "int64")']
        for name in ("k_cache", "v_cache"):
            page_size, size = self.call.args[name].shape[2:]
            step = 64 // BYTES[self.cache_dtype]
            lines.append(f"                for line in T.serial({-(-page_size * size // step)}):")
            lines.append(f"                    {self.vectors.prefetch(f'{name}[next_page, head, 0, line * {step}]')}")
        lines += [f"                {self.vectors.prefetch(f'{name}[next_page, head, 0]')}" for name in self.scales]
        return "\n".join(lines)

    @staticmethod
    def _first_seen(position: str, window: int, chunk: int) -> str:
        """The first position that `position` attends to."""
        first = "0"
        if window:
            first = f"T.max({first}, {position} - {window - 1})"
        if chunk:
            first = f"T.max({first}, ({position}) // {chunk} * {chunk})"
        return first

    def _page(self) -> str:
        """One page meets `rows` query heads of one token, by as many cached tokens as a vector has lanes."""
        lanes, page_size = self.vectors.lanes, self.call.args["k_cache"].shape[2]
        whole, rest = page_size // lanes, page_size % lanes
        parts = [f"for part in T.serial({whole}):\n{indent(self._cached(f'part * {lanes}', lanes), '    ')}"] if whole else []
        parts += [f"for part in T.serial(1):\n{indent(self._cached(str(whole * lanes), rest), '    ')}"] if rest else []
        return "\n".join(parts)

    def _cached(self, begin: str, count: int) -> str:
        """`count` cached tokens from `begin` on in the page."""
        v, args = self.vectors, self.call.args
        (page_size, e), f = args["k_cache"].shape[2:], args["v_cache"].shape[3]
        state = "state[share * tokens + t, first_head + r"
        maximum, exponentials = f"{state}, {self.sums_width}]", f"{state}, {self.sums_width + v.lanes}]"
        dots = [f"dots{j // 8}[{j % 8}]" if j < count else v.splat(0.0) for j in range(v.lanes)]
        step = v.lanes if self.scales else v.step(self.dtype)
        tokens = None if count == v.lanes else str(count)

        def products(k: str, part: str | None) -> list[str]:
            keys = [f"k_cache[page, head, {begin} + {j}, {k}]" for j in range(count)]
            if not self.scales:
                return [f"{d} = {v.dot(self.dtype, d, f'q[t, first_head + r, {k}]', key, part)}" for d, key in zip(dots, keys, strict=False)]
            query = f"query: T.let = {v.load(self.dtype, f'q[t, first_head + r, {k}]', part)}"
            return [query, *(f"{d} = {d} + query * {v.load(self.cache_dtype, key, part)}" for d, key in zip(dots, keys, strict=False))]

        scores = f"{v.call('sums', *dots)} * {v.splat(args['scale'])}"
        weight = "weight"
        if self.scales:
            scores += f" * {v.load('float32', f'k_scale[page, head, {begin}]', tokens)}"
            weight += f" * {v.load('float32', f'v_scale[page, head, {begin}]', tokens)}"
        if softcap := args["softcap"]:
            scores = f"{v.call('tanh', f'({scores}) * {v.splat(1 / softcap)}')} * {v.splat(softcap)}"
        if "alibi_slopes" in self.options:
            slope = v.splat(v.load_one(DTYPES[args["alibi_slopes"].dtype], "alibi_slopes[first_head + r]"))
            begins_at = v.splat('T.cast(here - position, "float32")')
            scores += f" + ({v.call('numbers')} + {begins_at}) * {slope}"
        seen = self._first_seen("position", args["window"], args["chunk"])

        def weigh(k: str, part: str | None) -> list[str]:
            here = f"state[share * tokens + t, first_head + r, {k}]"
            return [
                f"for r in T.unroll({self.rows}):",
                f"    sums[r] = {v.load('float32', here)} * shrink[r]",
                f"for j in T.unroll({count}):",
                f"    value: T.let = {v.load(self.cache_dtype, f'v_cache[page, head, {begin} + j, {k}]', part)}",
                f"    for r in T.unroll({self.rows}):",
                f"        sums[r] = sums[r] + {v.splat(f'weights[r * {v.lanes} + j]')} * value",
                f"for r in T.unroll({self.rows}):",
                f"    {v.store('float32', here, 'sums[r]')}",
            ]

        groups = sorted({j // 8 for j in range(count)})
        tab = "    "
        lines = [
            f"here: T.let = page_number * {page_size} + {begin}",
            f'weights = T.alloc_buffer(({self.rows * v.lanes},), "float32", scope="global")',
            f'shrink = T.alloc_buffer(({self.rows},), "{v.type}", scope="global")',
            f'sums = T.alloc_buffer(({self.rows},), "{v.type}", scope="global")',
            f"for r in T.serial({self.rows}):",
            *(f'{tab}dots{g} = T.alloc_buffer((8,), "{v.type}", scope="global")' for g in groups),
            *(f"{tab}{d} = {v.splat(0.0)}" for d in dots[:count]),
            *([f"{tab}for k in T.serial({e // step}):", *(tab * 2 + p for p in products(f"k * {step}", None))] if e >= step else []),
            *(tab + p for p in (products(str(e // step * step), str(e % step)) if e % step else [])),
            f"{tab}scores: T.let = {scores}",
            f"{tab}seen: T.let = {v.call('between', 'scores', f'{seen} - here', f'T.min(position + 1 - here, {count})')}",
            f"{tab}before: T.let = {v.load('float32', maximum)}",
            f"{tab}after: T.let = T.max(before, {v.splat(v.max('seen'))})",
            f"{tab}weight: T.let = {v.call('exp', 'seen - after')}",
            f"{tab}shrink[r] = {v.call('exp', 'before - after')}",
            tab + v.store("float32", f"weights[r * {v.lanes}]", weight),
            tab + v.store("float32", maximum, "after"),
            tab + v.store("float32", exponentials, f"{v.load('float32', exponentials)} * shrink[r] + weight"),
            v.over(f, weigh, 0),
        ]
        return "\n".join(lines)

    def _join(self) -> str:
        """The loop over rows of the result: shares are brought to one maximum, added and divided."""
        v, heads, f = self.vectors, self.call.args["q"].shape[1], self.call.args["v_cache"].shape[3]
        maximum, exponentials = f"state[share * tokens + t, head, {self.sums_width}]", f"state[share * tokens + t, head, {self.sums_width + v.lanes}]"
        sink = v.splat(v.load_one(DTYPES[self.call.args["sinks"].dtype], "sinks[head]")) if "sinks" in self.options else None

        def divided(k: str, count: str | None) -> list[str]:
            here = f"state[share * tokens + t, head, {k}]"
            return [
                f"total[0] = {v.splat(0.0)}",
                f"for share in T.unroll({self.splits}):",
                f"    total[0] = total[0] + {v.load('float32', here)} * factor[share]",
                v.store(self.dtype, f"y[t, head, {k}]", f"total[0] * {v.splat('inverse')}", count),
            ]

        return f"""
for t in {"T.parallel" if self.steps.max_tokens > BLOCK else "T.serial"}(tokens):
    for head in T.serial({heads}):
        factor = T.alloc_buffer(({self.splits},), "{v.type}", scope="global")
        largest = T.alloc_buffer((1,), "{v.type}", scope="global")
        total = T.alloc_buffer((1,), "{v.type}", scope="global")
        largest[0] = {sink or v.splat(NOTHING)}
        total[0] = {v.splat(0.0)}
        for share in T.unroll({self.splits}):
            largest[0] = T.max(largest[0], {v.load("float32", maximum)})
        for share in T.unroll({self.splits}):
            factor[share] = {v.call("exp", f"{v.load('float32', maximum)} - largest[0]")}
            total[0] = total[0] + {v.load("float32", exponentials)} * factor[share]
        divisor: T.let = {v.sum("total[0]")}{f" + {v.first(v.call('exp', f'{sink} - largest[0]'))}" if sink else ""}
        inverse: T.let = T.if_then_else(divisor > T.float32(0), T.float32(1) / divisor, T.float32(0))
{v.over(f, divided, 2)}
"""
