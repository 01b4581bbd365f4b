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
from .vector import BYTES, CACHE_DTYPES, DTYPES, Buffer, Vectors, cache_operand, numbers

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
    block, splits = shares(steps, target, k_cache.shape[1])
    kernel = Attention(Vectors(target), call, steps, options, scales, block, splits)
    scratch = Tensor(torch.float32, ({"T": splits}, q.shape[1], kernel.state_width))
    caches = [cache_operand(call, n) for n in ("k_cache", "v_cache")]
    operands = [Operand(arg="q"), *caches, *(Operand(arg=n) for n in (*scales, *indices, *options)), Operand(scratch=0), Operand(out=0)]
    launch = Launch(Source("paged_attention", "tvm", "paged_attention", kernel.text()), tuple(operands))
    return [Candidate(f"split{splits}_block{block}", (launch,), (scratch,))]


def shares(steps: Steps, target: Target, kv_heads: int) -> tuple[int, int]:
    """Tokens of a task, and tasks that share their pages: none where a row's order must not depend on the other rows of its block."""
    block = 1 if steps.max_num_new == 1 else max(1, min(BLOCK, steps.max_tokens // 4))
    if steps.deterministic:
        return block, 1
    tasks = kv_heads * -(-steps.max_tokens // block)
    return block, max(1, min(8, (2 * target.num_threads or TASKS) // tasks))


@dataclass(frozen=True)
class Attention:
    """The text of a kernel. Those of other caches say with other methods where queries, keys and values lie."""

    vectors: Vectors
    call: Call
    steps: Steps
    options: list[str]
    scales: list[str]
    block: int
    splits: int

    @property
    def caches(self) -> tuple[str, str]:
        """Of keys and of values."""
        return "k_cache", "v_cache"

    @property
    def queries(self) -> tuple[str, ...]:
        """Tensors [T, H, …] that side by side are the queries."""
        return ("q",)

    @property
    def heads(self) -> int:
        return self.call.results[0].shape[1]  # type: ignore[return-value]

    @property
    def value_size(self) -> int:
        return self.call.results[0].shape[2]  # type: ignore[return-value]

    @property
    def dtype(self) -> str:
        return DTYPES[self.call.results[0].dtype]

    @property
    def cache(self) -> Tensor:
        return self.call.args[self.caches[0]]  # type: ignore[no-any-return]

    @property
    def cache_dtype(self) -> str:
        return CACHE_DTYPES[self.cache.dtype]

    @property
    def sums_width(self) -> int:
        """F, rounded up to whole vectors."""
        return -(-self.value_size // self.vectors.lanes) * self.vectors.lanes

    @property
    def state_width(self) -> int:
        return self.sums_width + 2 * self.vectors.lanes

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.cache.shape[1]  # type: ignore[operator]

    @property
    def rows(self) -> int:
        """How many of them are computed together."""
        return max(r for r in range(1, LARGEST_GROUP + 1) if self.group % r == 0)

    def text(self) -> str:
        args, tokens, heads = self.call.args, "tokens", self.heads
        scaled: tuple[int | str, ...] = ("pages", *numbers(self.cache.shape[1:3]))
        buffers: list[Buffer] = [
            *((n, self.dtype, (tokens, *args[n].shape[1:])) for n in self.queries),
            *((n, self.cache_dtype, ("pages", *args[n].shape[1:])) for n in dict.fromkeys(self.caches)),
            *((n, "float32", scaled) for n in self.scales),
            ("cu_seqlens_q", "int32", ("starts",)),
            ("seq_lens", "int32", ("seqs",)),
            ("page_table", "int32", ("seqs", "table_width")),
            *((n, DTYPES[args[n].dtype], (heads,)) for n in self.options),
            *self.more_buffers,
            ("state", "float32", ("shares", heads, self.state_width)),
            ("y", self.dtype, (tokens, heads, self.value_size)),
        ]
        return self.vectors.script(self.call.op, buffers, self._gather() + self._join())

    @property
    def more_buffers(self) -> list[Buffer]:
        """What a subclass reads beside."""
        return []

    @property
    def reset(self) -> str:
        """A statement over `row` of a task and vector `k`: nothing was seen."""
        lanes = self.vectors.lanes
        here = f"state[share * tokens + begin + row // {self.group}, head * {self.group} + row % {self.group}, k * {lanes}]"
        return self.vectors.store("float32", here, self.vectors.splat(f"T.if_then_else(k == {self.sums_width // lanes}, T.float32({NOTHING}), T.float32(0))"))

    def _gather(self) -> str:
        """The parallel loop over tasks."""
        kv_heads, page_size = self.cache.shape[1:3]
        # Blocks of one head are neighbours: static shares of the heads are even where causal blocks are not.
        return f"""
blocks: T.let = (tokens + {self.block - 1}) // {self.block}
for task in T.parallel({self.splits * kv_heads} * blocks):
    share: T.let = task // ({kv_heads} * blocks)
    head: T.let = task // blocks % {kv_heads}
    begin: T.let = task % blocks * {self.block}
    end: T.let = T.min(begin + {self.block}, tokens)
    for row in T.serial((end - begin) * {self.group}):
        for k in T.serial({self.state_width // self.vectors.lanes}):
            {self.reset}
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
            first_page: T.let = {self._first_seen("start + to_position")} // {page_size}
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
        for name in dict.fromkeys(self.caches):
            page_size, size = self.call.args[name].shape[2:]
            step = 64 // BYTES[self.cache_dtype]
            lines.append(f"                for line in T.serial({-(-page_size * size // step)}):")
            lines.append(f"                    {self.vectors.prefetch(f'{name}[next_page, head, 0, line * {step}]')}")
        lines += [f"                {self.vectors.prefetch(f'{name}[next_page, head, 0]')}" for name in self.scales]
        return "\n".join(lines)

    def _first_seen(self, position: str) -> str:
        """The first position that `position` attends to."""
        first = "0"
        if window := self.call.args["window"]:
            first = f"T.max({first}, {position} - {window - 1})"
        if chunk := self.call.args.get("chunk"):
            first = f"T.max({first}, ({position}) // {chunk} * {chunk})"
        return first

    def _page(self) -> str:
        """One page meets `rows` query heads of one token, by as many cached tokens as a vector has lanes."""
        lanes, page_size = self.vectors.lanes, self.cache.shape[2]
        assert isinstance(page_size, int)
        whole, rest = page_size // lanes, page_size % lanes
        parts = [f"for part in T.serial({whole}):\n{indent(self._cached(f'part * {lanes}', lanes), '    ')}"] if whole else []
        parts += [f"for part in T.serial(1):\n{indent(self._cached(str(whole * lanes), rest), '    ')}"] if rest else []
        return "\n".join(parts)

    def _element(self, name: str, number: str, k: str) -> str:
        """Element `k` of cached token `number` in the page."""
        return f"{name}[page, head, {number}, {k}]"

    def _place(self, begin: str) -> list[str]:
        return [f"here: T.let = page_number * {self.cache.shape[2]} + {begin}"]

    def _seen(self, count: int) -> str:
        """`scores` where a cached token is seen, else −∞."""
        first = self._first_seen("position")
        return self.vectors.call("between", "scores", f"{first} - here", f"T.min(position + 1 - here, {count})")

    def _cached(self, begin: str, count: int) -> str:
        """`count` cached tokens from `begin` on in the page."""
        v, args = self.vectors, self.call.args
        keys, values = self.caches
        state = "state[share * tokens + t, first_head + r"
        maximum, exponentials = f"{state}, {self.sums_width}]", f"{state}, {self.sums_width + v.lanes}]"
        dots = [f"dots{j // 8}[{j % 8}]" if j < count else v.splat(0.0) for j in range(v.lanes)]
        step = v.lanes if self.scales else v.step(self.dtype)
        tokens = None if count == v.lanes else str(count)

        def products(q: str, offset: int, k: str, part: str | None) -> list[str]:
            own = [self._element(keys, f"{begin} + {j}", f"{offset} + {k}" if offset else k) for j in range(count)]
            if not self.scales:
                return [f"{d} = {v.dot(self.dtype, d, f'{q}[t, first_head + r, {k}]', key, part)}" for d, key in zip(dots, own, strict=False)]
            query = f"query: T.let = {v.load(self.dtype, f'{q}[t, first_head + r, {k}]', part)}"
            return [query, *(f"{d} = {d} + query * {v.load(self.cache_dtype, key, part)}" for d, key in zip(dots, own, strict=False))]

        multiplied, offset = [], 0
        for q in self.queries:
            size = args[q].shape[2]
            if size >= step:
                multiplied += [f"for k in T.serial({size // step}):", *("    " + p for p in products(q, offset, f"k * {step}", None))]
            if size % step:
                multiplied += products(q, offset, str(size // step * step), str(size % step))
            offset += size

        scores = f"{v.call('sums', *dots)} * {v.splat(args['scale'])}"
        weight = "weight"
        if self.scales:
            scores += f" * {v.load('float32', f'k_scale[page, head, {begin}]', tokens)}"
            weight += f" * {v.load('float32', f'v_scale[page, head, {begin}]', tokens)}"
        if softcap := args.get("softcap"):
            scores = f"{v.call('tanh', f'({scores}) * {v.splat(1 / softcap)}')} * {v.splat(softcap)}"
        if "alibi_slopes" in self.options:
            slope = v.splat(v.load_one(DTYPES[args["alibi_slopes"].dtype], "alibi_slopes[first_head + r]"))
            begins_at = v.splat('T.cast(here - position, "float32")')
            scores += f" + ({v.call('numbers')} + {begins_at}) * {slope}"

        def weigh(k: str, part: str | None) -> list[str]:
            here = f"state[share * tokens + t, first_head + r, {k}]"
            return [
                f"for r in T.unroll({self.rows}):",
                f"    sums[r] = {v.load('float32', here)} * shrink[r]",
                f"for j in T.unroll({count}):",
                f"    value: T.let = {v.load(self.cache_dtype, self._element(values, f'{begin} + j', k), part)}",
                f"    for r in T.unroll({self.rows}):",
                f"        sums[r] = sums[r] + {v.splat(f'weights[r * {v.lanes} + j]')} * value",
                f"for r in T.unroll({self.rows}):",
                f"    {v.store('float32', here, 'sums[r]')}",
            ]

        groups = sorted({j // 8 for j in range(count)})
        tab = "    "
        lines = [
            *self._place(begin),
            f'weights = T.alloc_buffer(({self.rows * v.lanes},), "float32", scope="global")',
            f'shrink = T.alloc_buffer(({self.rows},), "{v.type}", scope="global")',
            f'sums = T.alloc_buffer(({self.rows},), "{v.type}", scope="global")',
            f"for r in T.serial({self.rows}):",
            *(f'{tab}dots{g} = T.alloc_buffer((8,), "{v.type}", scope="global")' for g in groups),
            *(f"{tab}{d} = {v.splat(0.0)}" for d in dots[:count]),
            *(tab + line for line in multiplied),
            f"{tab}scores: T.let = {scores}",
            f"{tab}seen: T.let = {self._seen(count)}",
            f"{tab}before: T.let = {v.load('float32', maximum)}",
            f"{tab}after: T.let = T.max(before, {v.splat(v.max('seen'))})",
            f"{tab}weight: T.let = {v.call('exp', 'seen - after')}",
            f"{tab}shrink[r] = {v.call('exp', 'before - after')}",
            tab + v.store("float32", f"weights[r * {v.lanes}]", weight),
            tab + v.store("float32", maximum, "after"),
            tab + v.store("float32", exponentials, f"{v.load('float32', exponentials)} * shrink[r] + weight"),
            v.over(self.value_size, weigh, 0),
        ]
        return "\n".join(lines)

    def _join(self) -> str:
        """The loop over rows of the result: shares are brought to one maximum, added and divided."""
        v = self.vectors
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
    for head in T.serial({self.heads}):
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
{v.over(self.value_size, divided, 2)}
"""
