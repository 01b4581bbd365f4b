"""The delta rule and channel-wise recurrences.

Walked token by token where sequences bring few, as in `state_space.py`. Of prompts, the delta rule with a decay for each head is computed in
chunks (Yang et al. 2024): with G the running sum of log decays in a chunk and A = β k kᵀ ∘ e^{G_i − G_j} below the diagonal, what its tokens add
to the state is δ = (I + A)⁻¹ β (v − e^G k S), and y = e^G q S + (q kᵀ ∘ e^{G_i − G_j}, i ≥ j) δ; S ← e^{G_end} S + (e^{G_end − G} k)ᵀ δ. One launch
inverts I + A for every chunk, the next walks the chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..kernel import Call, Candidate, Operand, Steps, Tensor, claims
from ..target import Target
from .ragged import tile_of, tiles_of
from .sequences import aligned, decodes, operands, recurrent, sequence, sequences
from .source import launch, power_of_two
from .state_space import chunked, stages


@triton.jit
def delta_walk_kernel(q, k, v, g, beta, delta_state, cu_seqlens_q, seq_lens, state_slots, y, num_tokens, num_seqs, q_pitch, k_pitch, v_pitch, g_pitch,
                      beta_pitch, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, F: tl.constexpr, EPS: tl.constexpr, CHANNELS: tl.constexpr,
                      BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, DECODE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """CHANNELS: g has a value for each channel of the key."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    begin, end, slot, fresh = sequence(tl.program_id(0), cu_seqlens_q, seq_lens, state_slots, num_tokens, num_seqs, DECODE)
    head = tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    f = tl.program_id(2) * BLOCK_F + tl.arange(0, BLOCK_F)
    if slot >= 0:
        mask = (e < E)[:, None] & (f < F)[None, :]
        at = delta_state + (slot * H + head) * E * F + e[:, None] * F + f[None, :]
        s = tl.load(at, mask=mask & (fresh == 0), other=0.0)
        for t in range(begin, end):
            column = head // (H // K) * E + e
            query = tl.load(q + t * aligned(q_pitch, q, K * E) + column, mask=e < E, other=0.0).to(tl.float32)
            key = tl.load(k + t * aligned(k_pitch, k, K * E) + column, mask=e < E, other=0.0).to(tl.float32)
            value = tl.load(v + t * aligned(v_pitch, v, H * F) + head * F + f, mask=f < F, other=0.0).to(tl.float32)
            if EPS > 0:
                query *= tl.rsqrt(tl.sum(query * query) + EPS)
                key *= tl.rsqrt(tl.sum(key * key) + EPS)
            query *= E**-0.5
            if CHANNELS:
                s *= tl.exp(tl.load(g + t * aligned(g_pitch, g, H * E) + head * E + e, mask=e < E, other=0.0).to(tl.float32))[:, None]
            else:
                s *= tl.exp(tl.load(g + t * g_pitch + head).to(tl.float32))
            # both sums over the same state: neither waits for the other
            seen = tl.sum(s * key[:, None], 0)
            out = tl.sum(s * query[:, None], 0)
            delta = (value - seen) * tl.load(beta + t * beta_pitch + head).to(tl.float32)
            out += delta * tl.sum(query * key)
            s += key[:, None] * delta[None, :]
            tl.store(y + (t * H + head) * F + f, out.to(y.dtype.element_ty), mask=f < F)
        tl.store(at, s, mask=mask)
    else:
        for t in range(begin, end):
            tl.store(y + (t * H + head) * F + f, tl.zeros([BLOCK_F], y.dtype.element_ty), mask=f < F)


@triton.jit
def keys_of(k, t, there, column, e, pitch, WIDTH: tl.constexpr, E: tl.constexpr, EPS: tl.constexpr):
    """Rows of queries or keys in float32, normalized where EPS says so. WIDTH: of a row of all heads."""
    h = tl.load(k + t[:, None] * aligned(pitch, k, WIDTH) + column[None, :], mask=there[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)
    if EPS > 0:
        h *= tl.rsqrt(tl.sum(h * h, 1) + EPS)[:, None]
    return h


@triton.jit
def joined(made, a, i, SIZE: tl.constexpr):
    """From inverses of blocks of SIZE on the diagonal of I + a to those of blocks twice as large."""
    below = tl.where((i[:, None] // (2 * SIZE) == i[None, :] // (2 * SIZE)) & (i[:, None] // SIZE > i[None, :] // SIZE), a, 0.0)
    if SIZE == 1:
        made -= below
    else:
        made -= tl.dot(tl.dot(made, below, input_precision="tf32x3"), made, input_precision="tf32x3")
    return made


@triton.jit
def delta_inverse_kernel(k, g, beta, cu_seqlens_q, inverse, num_tokens, num_seqs, k_pitch, g_pitch, beta_pitch, H: tl.constexpr, K: tl.constexpr,
                         E: tl.constexpr, EPS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """(I + A)⁻¹ of a chunk and head; a token has a row of it. Blocks on the diagonal are joined, twice as large each time:
    of lower triangular X and Y with L below them, the inverse has −Y⁻¹ L X⁻¹ there."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(1)
    seq, start, begin = tile_of(tl.program_id(0), cu_seqlens_q, num_seqs, 1, CHUNK, BLOCK_S)
    first = start + begin
    end = tl.load(cu_seqlens_q + seq + 1, mask=seq < num_seqs, other=num_tokens)
    HELD: tl.constexpr = tl.bfloat16 if k.dtype.element_ty == tl.bfloat16 else tl.float32
    if (first < end) & (seq < num_seqs):
        i = tl.arange(0, CHUNK)
        t = first + i
        there = t < end
        e = tl.arange(0, BLOCK_E)
        key = keys_of(k, t, there, head // (H // K) * E + e, e, k_pitch, K * E, E, EPS).to(HELD)
        running = tl.cumsum(tl.load(g + t * g_pitch + head, mask=there, other=0.0).to(tl.float32), 0)
        b = tl.load(beta + t * beta_pitch + head, mask=there, other=0.0).to(tl.float32)
        a = tl.exp(tl.where(i[:, None] > i[None, :], running[:, None] - running[None, :], float("-inf"))) * b[:, None]
        a *= tl.dot(key, tl.trans(key), input_precision="tf32x3")
        made = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
        for level in tl.static_range(7):
            if 1 << level < CHUNK:
                made = joined(made, a, i, 1 << level)
        tl.store(inverse + (t * H + head)[:, None] * CHUNK + i[None, :], made, mask=there[:, None])


@triton.jit
def delta_chunk_kernel(q, k, v, g, beta, delta_state, cu_seqlens_q, seq_lens, state_slots, y, num_tokens, num_seqs, q_pitch, k_pitch, v_pitch, g_pitch,
                       beta_pitch, inverse, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, F: tl.constexpr, EPS: tl.constexpr, BLOCK_E: tl.constexpr,
                       BLOCK_F: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    begin, end, slot, fresh = sequence(tl.program_id(0), cu_seqlens_q, seq_lens, state_slots, num_tokens, num_seqs, False)
    head = tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    f = tl.program_id(2) * BLOCK_F + tl.arange(0, BLOCK_F)
    i = tl.arange(0, CHUNK)
    # of float16, whose ten bits are those of tf32, what is held in between has more
    HELD: tl.constexpr = tl.bfloat16 if v.dtype.element_ty == tl.bfloat16 else tl.float32
    if slot >= 0:
        mask = (e < E)[:, None] & (f < F)[None, :]
        at = delta_state + (slot * H + head) * E * F + e[:, None] * F + f[None, :]
        s = tl.load(at, mask=mask & (fresh == 0), other=0.0)
        column = head // (H // K) * E + e
        for start in range(begin, end, CHUNK):
            t = start + i
            there = t < end
            key = keys_of(k, t, there, column, e, k_pitch, K * E, E, EPS).to(HELD)
            query = (keys_of(q, t, there, column, e, q_pitch, K * E, E, EPS) * E**-0.5).to(HELD)
            value = tl.load(v + t[:, None] * aligned(v_pitch, v, H * F) + (head * F + f)[None, :], mask=there[:, None] & (f < F)[None, :], other=0.0).to(
                tl.float32
            )
            log_decay = tl.load(g + t * g_pitch + head, mask=there, other=0.0).to(tl.float32)
            running = tl.cumsum(log_decay, 0)
            total = tl.sum(log_decay, 0)
            b = tl.load(beta + t * beta_pitch + head, mask=there, other=0.0).to(tl.float32)
            made = tl.load(inverse + (t * H + head)[:, None] * CHUNK + i[None, :], mask=there[:, None], other=0.0)
            before = s.to(HELD)
            fade = tl.exp(running)[:, None]
            missing = (value - tl.dot(key, before, input_precision="tf32x3") * fade) * b[:, None]
            delta = tl.dot(made.to(HELD), missing.to(HELD), input_precision="tf32x3").to(HELD)
            weights = tl.exp(tl.where(i[:, None] >= i[None, :], running[:, None] - running[None, :], float("-inf")))
            weights *= tl.dot(query, tl.trans(key), input_precision="tf32x3")
            out = tl.dot(query, before, input_precision="tf32x3") * fade
            out = tl.dot(weights.to(HELD), delta, out, input_precision="tf32x3")
            tl.store(y + (t * H + head)[:, None] * F + f[None, :], out.to(y.dtype.element_ty), mask=there[:, None] & (f < F)[None, :])
            entering = (key.to(tl.float32) * tl.exp(total - running)[:, None]).to(HELD)
            s = tl.dot(tl.trans(entering), delta, s * tl.exp(total), input_precision="tf32x3")
        tl.store(at, s, mask=mask)
    else:
        for start in range(begin, end, CHUNK):
            t = start + i
            zero = tl.zeros([CHUNK, BLOCK_F], y.dtype.element_ty)
            tl.store(y + (t * H + head)[:, None] * F + f[None, :], zero, mask=(t < end)[:, None] & (f < F)[None, :])


@claims("gated_delta_rule", "triton")
def gated_delta_rule(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    (tokens, keys, e), (_, heads, f), g = args["k"].shape, args["v"].shape, args["g"]
    block_e = max(16, power_of_two(e))
    if not recurrent(call, "delta_state") or block_e > 256:
        return []
    names = ("q", "k", "v", "g", "beta")
    given = operands(call, (*names, "delta_state"), names)
    constants: dict[str, Any] = {"H": heads, "K": keys, "E": e, "F": f, "EPS": args["eps"], "BLOCK_E": block_e}
    found = []
    if chunked(steps, *(args[n] for n in ("q", "k", "v"))) and len(g.shape) == 2:
        seqs = args["state_slots"].shape[0]
        for rank, (chunk, block_f, warps) in enumerate(((64, 64, 8), (64, 64, 4), (64, 32, 4), (32, 64, 4))):
            block_f = min(block_f, max(16, power_of_two(f)))
            scratch = (Tensor(torch.float32, (tokens, heads, chunk)),)
            of_chunk = constants | {"CHUNK": chunk}
            inverts = {n: given[n] for n in ("k", "g", "beta", "cu_seqlens_q")} | {"inverse": Operand(scratch=0)}
            inverts |= {n: given[n] for n in ("num_tokens", "num_seqs", "k_pitch", "g_pitch", "beta_pitch")}
            tile = {n: c for n, c in of_chunk.items() if n != "F"} | {"BLOCK_S": power_of_two(steps.max_seqs + 1)}
            grid = (tiles_of(tokens, seqs, chunk), (heads, 1))
            first = launch(call, [delta_inverse_kernel, tile_of, joined, keys_of, aligned], inverts, tile, grid, scratch=scratch)
            walks, grid = given | {"inverse": Operand(scratch=0)}, (sequences(call, steps), (heads, 1), (f, block_f))
            functions = [delta_chunk_kernel, keys_of, aligned, sequence]
            second = launch(call, functions, walks, of_chunk | {"BLOCK_F": block_f}, grid, scratch=scratch, num_warps=warps, num_stages=stages(target, block_e))
            found.append(Candidate(f"chunk{chunk}_f{block_f}_w{warps}", (first, second), scratch, rank))
    for rank, block in enumerate((16, 32, 8) if steps.max_seqs * heads * e * f <= 1 << 22 else (32, 16, 64)):
        block_f = min(power_of_two(f), block)
        tile = constants | {"CHANNELS": len(g.shape) == 3, "BLOCK_F": block_f, "DECODE": decodes(steps)}
        grid = (sequences(call, steps), (heads, 1), (f, block_f))
        one = launch(call, [delta_walk_kernel, aligned, sequence], given, tile, grid, num_warps=max(1, min(4, block_e * block_f // 512)))
        found.append(Candidate(f"walk_f{block_f}", (one,), rank=10 + rank))
    return list({c.name: c for c in found}.values())


@triton.jit
def compose(decay, x, next_decay, next_x):
    """h ← decay · h + x, then h ← next_decay · h + next_x."""
    return decay * next_decay, x * next_decay + next_x


@triton.jit
def linear_recurrence_kernel(x, decay, lru_state, cu_seqlens_q, seq_lens, state_slots, y, num_tokens, num_seqs, x_pitch, decay_pitch, CHANNELS: tl.constexpr,
                             BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, DECODE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Tiles of a sequence's tokens, one after the other; within a tile by an associative scan (Blelloch 1990)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    begin, end, slot, fresh = sequence(tl.program_id(0), cu_seqlens_q, seq_lens, state_slots, num_tokens, num_seqs, DECODE)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_T)
    at = lru_state + slot * CHANNELS + c
    h = tl.load(at, mask=(c < CHANNELS) & (slot >= 0) & (fresh == 0), other=0.0)
    for start in range(begin, end, BLOCK_T):
        t = start + i
        there = (t < end)[:, None] & (c < CHANNELS)[None, :]
        known = there & (slot >= 0)
        new = tl.load(x + t[:, None] * aligned(x_pitch, x, CHANNELS) + c[None, :], mask=known, other=0.0).to(tl.float32)
        kept = tl.load(decay + t[:, None] * aligned(decay_pitch, decay, CHANNELS) + c[None, :], mask=known, other=1.0).to(tl.float32)
        if BLOCK_T > 1:
            kept, new = tl.associative_scan((kept, new), 0, compose)
        out = kept * h[None, :] + new
        tl.store(y + t[:, None] * CHANNELS + c[None, :], out.to(y.dtype.element_ty), mask=there)
        h = tl.sum(tl.where((i == BLOCK_T - 1)[:, None], out, 0.0), 0)
    tl.store(at, h, mask=(c < CHANNELS) & (slot >= 0) & (begin < end))


@claims("linear_recurrence", "triton")
def linear_recurrence(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    if not recurrent(call, "lru_state"):
        return []
    (channels,) = call.args["lru_state"].shape[1:]
    given = operands(call, ("x", "decay", "lru_state"), ("x", "decay"))
    # one token after the other gives the same sums wherever a prompt is cut
    tiles = ((1, 128, 4), (1, 256, 4)) if decodes(steps) or steps.deterministic else ((64, 32, 4), (32, 64, 4), (128, 32, 8))
    found = []
    for rank, (block_t, block_c, warps) in enumerate(tiles):
        tile = {"CHANNELS": channels, "BLOCK_T": block_t, "BLOCK_C": block_c, "DECODE": decodes(steps)}
        grid = (sequences(call, steps), (channels, block_c))
        one = launch(call, [linear_recurrence_kernel, compose, aligned, sequence], given, tile, grid, num_warps=warps)
        found.append(Candidate(f"t{block_t}_c{block_c}", (one,), rank=rank))
    return found


@triton.jit
def wkv_kernel(k, v, log_decay, bonus, wkv_state, cu_seqlens_q, seq_lens, state_slots, y, num_tokens, num_seqs, k_pitch, v_pitch, CHANNELS: tl.constexpr,
               BLOCK_C: tl.constexpr, DECODE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    begin, end, slot, fresh = sequence(tl.program_id(0), cu_seqlens_q, seq_lens, state_slots, num_tokens, num_seqs, DECODE)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < CHANNELS
    if slot >= 0:
        at = wkv_state + slot * (3 * CHANNELS) + c
        known = there & (fresh == 0)
        a = tl.load(at, mask=known, other=0.0)
        b = tl.load(at + CHANNELS, mask=known, other=0.0)
        top = tl.load(at + 2 * CHANNELS, mask=known, other=-1e38)
        w = tl.load(log_decay + c, mask=there, other=0.0).to(tl.float32)
        u = tl.load(bonus + c, mask=there, other=0.0).to(tl.float32)
        for t in range(begin, end):
            key = tl.load(k + t * aligned(k_pitch, k, CHANNELS) + c, mask=there, other=0.0).to(tl.float32)
            value = tl.load(v + t * aligned(v_pitch, v, CHANNELS) + c, mask=there, other=0.0).to(tl.float32)
            now = tl.maximum(top, key + u)
            old = tl.exp(top - now)
            new = tl.exp(key + u - now)
            out = (old * a + new * value) / (old * b + new)
            tl.store(y + t * CHANNELS + c, out.to(y.dtype.element_ty), mask=there)
            later = tl.maximum(top + w, key)
            old = tl.exp(top + w - later)
            new = tl.exp(key - later)
            a = old * a + new * value
            b = old * b + new
            top = later
        tl.store(at, a, mask=there)
        tl.store(at + CHANNELS, b, mask=there)
        tl.store(at + 2 * CHANNELS, top, mask=there)
    else:
        for t in range(begin, end):
            tl.store(y + t * CHANNELS + c, tl.zeros([BLOCK_C], y.dtype.element_ty), mask=there)


@claims("wkv", "triton")
def wkv(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    if not recurrent(call, "wkv_state"):
        return []
    (channels,) = call.args["wkv_state"].shape[2:]
    given = operands(call, ("k", "v", "log_decay", "bonus", "wkv_state"), ("k", "v"))
    found = []
    for rank, block_c in enumerate((64, 128) if decodes(steps) else (32, 64)):
        tile = {"CHANNELS": channels, "BLOCK_C": block_c, "DECODE": decodes(steps)}
        one = launch(call, [wkv_kernel, aligned, sequence], given, tile, (sequences(call, steps), (channels, block_c)), num_warps=max(1, block_c // 32))
        found.append(Candidate(f"c{block_c}", (one,), rank=rank))
    return found
