"""Sampling without a sort: the cut that top-k and top-p make is found by bisection over the bits of logits.

Four launches. Chunks of a row give their largest logit; a program a row finds the cut; chunks draw among what is left of them; a
program a row takes the best draw. A row without top-k and top-p spends nothing on the second.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..dims import product
from ..kernel import Call, Candidate, Operand, Steps, Tensor, claims
from ..target import Target
from .source import FLOATS, launch, power_of_two, supported

CHUNK = 4096
PASS = 16384
"""Logits that a program looks at together while it searches a row."""


@triton.jit
def key_of(x, BITS: tl.constexpr):
    """An integer of BITS bits that compares like the float, whose other bits are 0; −0 and 0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True) >> (32 - BITS)
    return bits ^ ((bits >> 31) & ((1 << (BITS - 1)) - 1))


@triton.jit
def value_of(key, BITS: tl.constexpr):
    """The float whose key it is."""
    return ((key ^ ((key >> 31) & ((1 << (BITS - 1)) - 1))) << (32 - BITS)).to(tl.float32, bitcast=True)


@triton.jit
def mix(z):
    """SplitMix64's finalizer, on uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def chunk_kernel(logits, top, V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * V + n, mask=n < V, other=float("-inf")).to(tl.float32)
    # a NaN must not hide behind numbers
    largest = tl.max(tl.where(x == x, x, float("inf")), 0)
    tl.store(top + row * CHUNKS + chunk, largest)


@triton.jit
def above(logits, key, best, t, V: tl.constexpr, PASS: tl.constexpr, BITS: tl.constexpr):
    """How many logits of a row have a larger key, and their mass in units of that of the best."""
    count = tl.zeros([PASS], tl.int32)
    mass = tl.zeros([PASS], tl.float32)
    for begin in range(0, V, PASS):
        n = begin + tl.arange(0, PASS)
        x = tl.load(logits + n, mask=n < V, other=float("-inf")).to(tl.float32)
        larger = (key_of(x, BITS) > key) & (n < V)
        count += larger.to(tl.int32)
        mass += tl.where(larger, tl.exp((x - best) / t), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def largest_key(logits, wanted, best, t, V: tl.constexpr, PASS: tl.constexpr, BITS: tl.constexpr, MASS: tl.constexpr):
    """The largest key that logits of the mass `wanted` (or so many, unless MASS) reach, bit by bit."""
    count, mass = above(logits, -1, best, t, V, PASS, BITS)
    reached = mass >= wanted if MASS else count >= wanted
    key = tl.where(reached, 0, -(1 << (BITS - 1)))
    for bit in range(1, BITS):
        probe = key + (1 << (BITS - 1 - bit))
        count, mass = above(logits, probe - 1, best, t, V, PASS, BITS)
        reached = mass >= wanted if MASS else count >= wanted
        key = tl.where(reached, probe, key)
    return key


@triton.jit
def cut_kernel(logits, top, temperature, top_k, top_p, min_p, cut, last, V: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
               PASS: tl.constexpr, BITS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """cut [R, 2]: the largest logit and the smallest kept one; last [R]: the largest id kept among those equal to the smallest."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    best = tl.max(tl.load(top + row * CHUNKS + c, mask=c < CHUNKS, other=float("-inf")), 0)
    t = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    k = tl.where((k == 0) | (k > V), V, k)
    logits += row * V
    least = tl.full([], float("-inf"), tl.float32)
    end = tl.full([], V, tl.int32)
    if (t > 0.0) & ((k < V) | (p < 1.0)) & (tl.abs(best) < float("inf")):
        smallest = tl.full([], -(1 << (BITS - 1)), tl.int32)
        wanted = tl.full([], V, tl.int32)  # of those equal to the smallest, how many are kept
        if k < V:
            smallest = largest_key(logits, k, best, t, V, PASS, BITS, False)
        count, weight = above(logits, smallest, best, t, V, PASS, BITS)
        if k < V:
            wanted = k - count
            weight += wanted.to(tl.float32) * tl.exp((value_of(smallest, BITS) - best) / t)
        if p < 1.0:
            found = largest_key(logits, p * weight, best, t, V, PASS, BITS, True)
            if found >= smallest:
                _, mass = above(logits, found, best, t, V, PASS, BITS)
                lacking = (p * weight - mass) / tl.exp((value_of(found, BITS) - best) / t)
                enough = tl.maximum(tl.ceil(tl.minimum(lacking, V)).to(tl.int32), 1)
                wanted = tl.where(found == smallest, tl.minimum(enough, wanted), enough)
                smallest = found
        least = value_of(smallest, BITS)
        seen = tl.full([], 0, tl.int32)
        end = tl.full([], -1, tl.int32)
        for begin in range(0, V, PASS):
            n = begin + tl.arange(0, PASS)
            x = tl.load(logits + n, mask=n < V, other=float("-inf")).to(tl.float32)
            same = ((key_of(x, BITS) == smallest) & (n < V)).to(tl.int32)
            rank = seen + tl.cumsum(same, 0)
            end = tl.maximum(end, tl.max(tl.where((same == 1) & (rank <= wanted), n, -1), 0))
            seen += tl.sum(same, 0)
    floor = best + t * tl.log(tl.load(min_p + row))
    end = tl.where(floor > least, V, end)
    least = tl.maximum(floor, least)
    tl.store(cut + row * 2, best)
    tl.store(cut + row * 2 + 1, least)
    tl.store(last + row, end)


@triton.jit
def draw_kernel(logits, top, temperature, seed, step, cut, last, score, token, V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    best = tl.load(cut + row * 2)
    least = tl.load(cut + row * 2 + 1)
    end = tl.load(last + row)
    t = tl.load(temperature + row)
    largest = tl.load(top + row * CHUNKS + chunk)
    found = tl.full([], float("-inf"), tl.float32)
    where = tl.full([], 0, tl.int32)
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    if t > 0.0:
        # noise lies between −2.9 and 37.5: a chunk that is further behind the best cannot win
        if (largest >= least) & ((largest - best) / t > -41.0):
            x = tl.load(logits + row * V + n, mask=n < V, other=float("-inf")).to(tl.float32)
            low = tl.load(seed + row * 2).to(tl.uint32, bitcast=True).to(tl.uint64)
            high = tl.load(seed + row * 2 + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
            stream = mix((high << 32 | low) + 0x9E3779B97F4A7C15) + tl.load(step + row).to(tl.uint64) * 0x9E3779B97F4A7C15
            bits = mix(mix(stream) + n.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 11
            uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 1.1102230246251565e-16, 0.99999994)
            # −log(1 − u): by its series where 1 − u would round
            tail = tl.where(uniform < 1e-3, uniform * (1.0 + uniform * (0.5 + uniform * 0.3333333)), -tl.log(1.0 - uniform))
            s = (x - best) / t - tl.log(tail)
            kept = (n < V) & ((x > least) | ((x == least) & (n <= end)))
            s = tl.where(kept, s, float("-inf"))
            found = tl.max(s, 0)
            where = chunk * CHUNK + tl.argmax(s, 0)
    elif largest == best:
        x = tl.load(logits + row * V + n, mask=n < V, other=float("-inf")).to(tl.float32)
        found = largest
        where = chunk * CHUNK + tl.argmax(x, 0)
    tl.store(score + row * CHUNKS + chunk, found)
    tl.store(token + row * CHUNKS + chunk, where)


@triton.jit
def take_kernel(cut, score, token, out, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    s = tl.load(score + row * CHUNKS + c, mask=c < CHUNKS, other=float("-inf"))
    drawn = tl.load(token + row * CHUNKS + tl.argmax(s, 0))
    finite = tl.abs(tl.load(cut + row * 2)) < float("inf")
    tl.store(out + row, tl.where(finite, drawn, -1))


@claims("sample", "triton")
def sample(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    logits = args["logits"]
    if not supported(call, target) or logits.dtype not in FLOATS:
        return []
    rows, vocab = logits.shape
    chunks = -(-vocab // CHUNK)
    block_c = power_of_two(chunks)
    f32, i32 = torch.float32, torch.int32
    shape = product(rows, chunks)
    scratch = (Tensor(f32, (shape,)), Tensor(f32, (rows, 2)), Tensor(i32, (rows,)), Tensor(f32, (shape,)), Tensor(i32, (shape,)))
    held = {n: Operand(scratch=i) for i, n in enumerate(("top", "cut", "last", "score", "token"))}
    given = {n: Operand(arg=n) for n in args}
    sizes: dict[str, Any] = {"V": vocab, "CHUNK": CHUNK, "CHUNKS": chunks}
    grid = ((rows, 1), (chunks, 1))

    def pick(*names: str) -> dict[str, Operand]:
        return {n: held.get(n) or given.get(n) or Operand(out=0) for n in names}

    bits = 16 if logits.dtype == torch.bfloat16 else 32
    searched = {"V": vocab, "CHUNKS": chunks, "BLOCK_C": block_c, "PASS": min(PASS, power_of_two(vocab)), "BITS": bits}
    launches = (
        launch(call, [chunk_kernel], pick("logits", "top"), sizes, grid, scratch=scratch, num_warps=4),
        launch(call, [cut_kernel, largest_key, above, key_of, value_of], pick("logits", "top", "temperature", "top_k", "top_p", "min_p", "cut", "last"),
               searched, ((rows, 1),), scratch=scratch, num_warps=32),
        launch(call, [draw_kernel, mix], pick("logits", "top", "temperature", "seed", "step", "cut", "last", "score", "token"), sizes, grid,
               scratch=scratch, num_warps=8),
        launch(call, [take_kernel], pick("cut", "score", "token", "out"), {"CHUNKS": chunks, "BLOCK_C": block_c}, ((rows, 1),), scratch=scratch, num_warps=1),
    )  # fmt: skip
    return [Candidate("bisection", launches, scratch)]
