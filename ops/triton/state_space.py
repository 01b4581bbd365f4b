"""Causal convolution and selective state spaces.

Walked token by token where sequences bring few, a part of the state in registers: it is read and written once, and nothing else is large.
Of prompts, Mamba-2's recurrence is computed in chunks (Dao & Gu 2024, section 6): with L the running sum of log decays in a chunk,
y = (C Bᵀ ∘ e^{L_i − L_j}, i ≥ j) Δx + e^L C hᵀ, and h ← e^{L_end} h + (e^{L_end − L} Δx)ᵀ B. A program owns rows of a head's state and
walks its chunks, so that states need no memory; C Bᵀ is computed anew for each of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..kernel import Call, Candidate, Steps, Tensor, claims
from ..target import SHARED_MEMORY_BYTES, Target
from .activations import activate
from .ragged import tile_of, tiles_of
from .sequences import aligned, decodes, operands, recurrent, sequence, sequences, softplus
from .source import launch, power_of_two


@triton.jit
def conv_kernel(x, weight, bias, conv_state, cu_seqlens_q, seq_lens, state_slots, y, num_tokens, num_seqs, x_pitch, CHANNELS: tl.constexpr,
                WIDTH: tl.constexpr, ACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Tiles of tokens × channels, numbered over the ragged batch: the states are read, and written by the next launch."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seq, start, first = tile_of(tl.program_id(0), cu_seqlens_q, num_seqs, 1, BLOCK_T, BLOCK_S)
    start, end, slot, fresh = sequence(seq, cu_seqlens_q, seq_lens, state_slots, num_tokens, num_seqs, False)
    if first < end - start:
        i = first + tl.arange(0, BLOCK_T)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        there = (i < end - start)[:, None] & (c < CHANNELS)[None, :]
        known = there & (slot >= 0)
        x_pitch = aligned(x_pitch, x, CHANNELS)
        acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        if bias is not None:
            acc += tl.load(bias + c, mask=c < CHANNELS, other=0.0).to(tl.float32)[None, :]
        for j in tl.static_range(WIDTH):
            source = i - (WIDTH - 1) + j
            h = tl.load(x + (start + source)[:, None] * x_pitch + c[None, :], mask=known & (source >= 0)[:, None], other=0.0).to(tl.float32)
            if first < WIDTH - 1:
                past = conv_state + (slot * CHANNELS + c)[None, :] * (WIDTH - 1) + (source + WIDTH - 1)[:, None]
                h += tl.load(past, mask=known & (source < 0)[:, None] & (fresh == 0), other=0.0).to(tl.float32)
            acc += h * tl.load(weight + c * WIDTH + j, mask=c < CHANNELS, other=0.0).to(tl.float32)[None, :]
        if ACT != "":
            acc = activate(acc, ACT)
        at = (start + i)[:, None] * CHANNELS + c[None, :]
        tl.store(y + at, tl.where(slot >= 0, acc, 0.0).to(y.dtype.element_ty), mask=there)


@triton.jit
def conv_state_kernel(x, weight, bias, conv_state, cu_seqlens_q, seq_lens, state_slots, y, num_tokens, num_seqs, x_pitch, CHANNELS: tl.constexpr,
                      WIDTH: tl.constexpr, ACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, DECODE: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """The last tokens of each sequence become its state; a step of DECODE is computed too."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    begin, end, slot, fresh = sequence(tl.program_id(0), cu_seqlens_q, seq_lens, state_slots, num_tokens, num_seqs, DECODE)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.arange(0, BLOCK_W)
    inside = (c < CHANNELS)[:, None]
    if (slot >= 0) & (begin < end):
        state = conv_state + (slot * CHANNELS + c)[:, None] * (WIDTH - 1) + j[None, :]
        # the last WIDTH − 1 tokens, as the state has them and this step
        source = end - begin - (WIDTH - 1) + j
        known = inside & (j < WIDTH - 1)[None, :]
        old = tl.load(state + (end - begin), mask=known & (source < 0)[None, :] & (fresh == 0), other=0.0).to(tl.float32)
        new = tl.load(x + (begin + source)[None, :] * x_pitch + c[:, None], mask=known & (source >= 0)[None, :], other=0.0).to(tl.float32)
        if DECODE:
            oldest = tl.load(conv_state + (slot * CHANNELS + c) * (WIDTH - 1), mask=(c < CHANNELS) & (fresh == 0), other=0.0).to(tl.float32)
            w = tl.load(weight + c[:, None] * WIDTH + j[None, :] + 1, mask=known, other=0.0).to(tl.float32)
            acc = tl.sum((old + new) * w, 1) + oldest * tl.load(weight + c * WIDTH, mask=c < CHANNELS, other=0.0).to(tl.float32)
            if bias is not None:
                acc += tl.load(bias + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
            if ACT != "":
                acc = activate(acc, ACT)
            tl.store(y + begin * CHANNELS + c, acc.to(y.dtype.element_ty), mask=c < CHANNELS)
        tl.debug_barrier()  # another thread may have an element's neighbour
        tl.store(state, (old + new).to(conv_state.dtype.element_ty), mask=known)
    elif DECODE:
        tl.store(y + begin * CHANNELS + c, tl.zeros([BLOCK_C], y.dtype.element_ty), mask=c < CHANNELS)


@claims("causal_conv1d", "triton")
def causal_conv1d(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    channels, width = args["weight"].shape
    if not recurrent(call) or width < 2:
        return []
    given = operands(call, ("x", "weight", "bias", "conv_state"), ("x",))
    constants = {"CHANNELS": channels, "WIDTH": width, "ACT": args["act"]}
    decode, (tokens, _), (seqs,) = decodes(steps), args["x"].shape, args["state_slots"].shape
    found = []
    for rank, block in enumerate((128, 256)):
        state = constants | {"BLOCK_C": block, "BLOCK_W": power_of_two(width - 1), "DECODE": decode}
        of_states = launch(call, [conv_state_kernel, sequence, activate], given, state, (sequences(call, steps), (channels, block)))
        if decode:
            found.append(Candidate(f"c{block}", (of_states,), rank=rank))
            continue
        block_t, block_c = min(16, power_of_two(steps.max_tokens)), block // 2
        tiled = constants | {"BLOCK_T": block_t, "BLOCK_C": block_c, "BLOCK_S": power_of_two(steps.max_seqs + 1)}
        of_tokens = launch(call, [conv_kernel, tile_of, aligned, sequence, activate], given, tiled, (tiles_of(tokens, seqs, block_t), (channels, block_c)))
        found.append(Candidate(f"t{block_t}_c{block_c}", (of_tokens, of_states), rank=rank))
    return found


@triton.jit
def ssd_step_size(dt, A, dt_bias, t, head, mask, dt_pitch, SOFTPLUS: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr):
    """Δ of tokens t, and Δ·A; both 0 outside of the mask."""
    step = tl.load(dt + t * dt_pitch + head, mask=mask, other=0.0).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + head).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    if DT_MIN is not None:
        step = tl.maximum(step, DT_MIN)
    if DT_MAX is not None:
        step = tl.minimum(step, DT_MAX)
    step = tl.where(mask, step, 0.0)
    return step, step * tl.load(A + head).to(tl.float32)


@triton.jit
def ssd_walk_kernel(x, dt, A, B, C, D, dt_bias, ssm_state, cu_seqlens_q, seq_lens, state_slots, y, num_tokens, num_seqs, x_pitch, dt_pitch, B_pitch, C_pitch,
                    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, SOFTPLUS: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr,
                    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, DECODE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    begin, end, slot, fresh = sequence(tl.program_id(0), cu_seqlens_q, seq_lens, state_slots, num_tokens, num_seqs, DECODE)
    head = tl.program_id(1)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    x_pitch = aligned(x_pitch, x, H * P)
    B_pitch = aligned(B_pitch, B, G * N)
    C_pitch = aligned(C_pitch, C, G * N)
    if slot >= 0:
        at = ssm_state + (slot * H + head) * P * N + p[:, None] * N + n[None, :]
        mask = (p < P)[:, None] & (n < N)[None, :]
        h = tl.load(at, mask=mask & (fresh == 0), other=0.0)
        for t in range(begin, end):
            step, log_decay = ssd_step_size(dt, A, dt_bias, t, head, t < end, dt_pitch, SOFTPLUS, DT_MIN, DT_MAX)
            now = tl.load(x + t * x_pitch + head * P + p, mask=p < P, other=0.0).to(tl.float32)
            b = tl.load(B + t * B_pitch + head // (H // G) * N + n, mask=n < N, other=0.0).to(tl.float32)
            c = tl.load(C + t * C_pitch + head // (H // G) * N + n, mask=n < N, other=0.0).to(tl.float32)
            h = h * tl.exp(log_decay) + (now * step)[:, None] * b[None, :]
            out = tl.sum(h * c[None, :], 1)
            if D is not None:
                out += now * tl.load(D + head).to(tl.float32)
            tl.store(y + (t * H + head) * P + p, out, mask=p < P)
        tl.store(at, h, mask=mask)
    else:
        for t in range(begin, end):
            tl.store(y + (t * H + head) * P + p, tl.zeros([BLOCK_P], tl.float32), mask=p < P)


@triton.jit
def ssd_chunk_kernel(x, dt, A, B, C, D, dt_bias, ssm_state, cu_seqlens_q, seq_lens, state_slots, y, num_tokens, num_seqs, x_pitch, dt_pitch, B_pitch, C_pitch,
                     H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, SOFTPLUS: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr,
                     BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """What is not an input is multiplied in bfloat16, or in tf32 beside float16, whose range is less than a state's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    begin, end, slot, fresh = sequence(tl.program_id(0), cu_seqlens_q, seq_lens, state_slots, num_tokens, num_seqs, False)
    head = tl.program_id(1)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    i = tl.arange(0, CHUNK)
    x_pitch = aligned(x_pitch, x, H * P)
    B_pitch = aligned(B_pitch, B, G * N)
    C_pitch = aligned(C_pitch, C, G * N)
    HELD: tl.constexpr = tl.bfloat16 if x.dtype.element_ty == tl.bfloat16 else tl.float32
    if slot >= 0:
        at = ssm_state + (slot * H + head) * P * N + p[:, None] * N + n[None, :]
        mask = (p < P)[:, None] & (n < N)[None, :]
        h = tl.load(at, mask=mask & (fresh == 0), other=0.0)
        for start in range(begin, end, CHUNK):
            t = start + i
            there = t < end
            step, log_decay = ssd_step_size(dt, A, dt_bias, t, head, there, dt_pitch, SOFTPLUS, DT_MIN, DT_MAX)
            running = tl.cumsum(log_decay, 0)
            total = tl.sum(log_decay, 0)
            now = tl.load(x + t[:, None] * x_pitch + (head * P + p)[None, :], mask=there[:, None] & (p < P)[None, :], other=0.0)
            group = head // (H // G) * N + n
            b = tl.load(B + t[:, None] * B_pitch + group[None, :], mask=there[:, None] & (n < N)[None, :], other=0.0)
            c = tl.load(C + t[:, None] * C_pitch + group[None, :], mask=there[:, None] & (n < N)[None, :], other=0.0)
            weights = tl.exp(tl.where(i[:, None] >= i[None, :], running[:, None] - running[None, :], float("-inf"))) * step[None, :]
            weights *= tl.dot(c, tl.trans(b))
            out = tl.dot(c.to(HELD), tl.trans(h).to(HELD)) * tl.exp(running)[:, None]
            out = tl.dot(weights.to(HELD), now.to(HELD), out)
            if D is not None:
                out += now.to(tl.float32) * tl.load(D + head).to(tl.float32)
            tl.store(y + (t * H + head)[:, None] * P + p[None, :], out, mask=there[:, None] & (p < P)[None, :])
            entering = now.to(tl.float32) * (step * tl.exp(total - running))[:, None]
            h = tl.dot(tl.trans(entering).to(HELD), b.to(HELD), h * tl.exp(total))
        tl.store(at, h, mask=mask)
    else:
        for start in range(begin, end, CHUNK):
            t = start + i
            zero = tl.zeros([CHUNK, BLOCK_P], tl.float32)
            tl.store(y + (t * H + head)[:, None] * P + p[None, :], zero, mask=(t < end)[:, None] & (p < P)[None, :])


def chunked(steps: Steps, *inputs: Tensor) -> bool:
    """Whether chunks are offered. Of float32 they are not: differences of running sums are not as exact. Nor are they of deterministic steps:
    what a chunk rounds depends on where a prompt was cut."""
    dtypes = {t.dtype for t in inputs}
    return not decodes(steps) and not steps.deterministic and len(dtypes) == 1 and torch.float32 not in dtypes


def stages(target: Target, width: int = 0) -> int:
    """Chunks that are on their way at once: where shared memory is small, or keys are wide, one fills it."""
    return 2 if SHARED_MEMORY_BYTES[target.isa] > 160 << 10 and width <= 128 else 1


_TILES = (((64, 64, 8), (64, 64, 4), (32, 64, 4), (64, 32, 4)), ((64, 64, 8), (32, 64, 8), (32, 32, 4)))  # rows of a state, tokens of a chunk, warps


@claims("ssd_scan", "triton")
def ssd_scan(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    x, b, c = (args[n] for n in ("x", "B", "C"))
    (_, heads, p), (_, groups, n) = x.shape, b.shape
    block_n = max(16, power_of_two(n))
    if not recurrent(call, "ssm_state") or block_n > 256:
        return []
    given = operands(call, ("x", "dt", "A", "B", "C", "D", "dt_bias", "ssm_state"), ("x", "dt", "B", "C"))
    constants: dict[str, Any] = {
        "H": heads, "P": p, "N": n, "G": groups, "SOFTPLUS": args["softplus"], "BLOCK_N": block_n,
        **{limit: bound if math.isfinite(bound) else None for limit, bound in (("DT_MIN", args["dt_min"]), ("DT_MAX", args["dt_max"]))},
    }  # fmt: skip
    found = []
    if chunked(steps, x, b, c):
        for rank, (block_p, chunk, warps) in enumerate(_TILES[block_n > 128]):
            tile = constants | {"BLOCK_P": min(block_p, max(16, power_of_two(p))), "CHUNK": chunk}
            functions = [ssd_chunk_kernel, aligned, ssd_step_size, sequence, softplus]
            grid = (sequences(call, steps), (heads, 1), (p, tile["BLOCK_P"]))
            found.append(
                Candidate(
                    f"chunk{chunk}_p{block_p}_w{warps}", (launch(call, functions, given, tile, grid, num_warps=warps, num_stages=stages(target)),), rank=rank
                )
            )
    # what a program holds: 4 KiB, so that few sequences fill the GPU, or 16
    for rank, size in enumerate((1024, 4096) if steps.max_seqs * heads * p * n <= 1 << 22 else (4096, 1024)):
        block_p = min(power_of_two(p), max(1, size // block_n))
        tile = constants | {"BLOCK_P": block_p, "DECODE": decodes(steps)}
        grid = (sequences(call, steps), (heads, 1), (p, block_p))
        one = launch(call, [ssd_walk_kernel, aligned, ssd_step_size, sequence, softplus], given, tile, grid, num_warps=max(1, min(4, block_p * block_n // 512)))
        found.append(Candidate(f"walk_p{block_p}", (one,), rank=10 + rank))
    return list({c.name: c for c in found}.values())


@triton.jit
def selective_walk_kernel(x, dt, A, B, C, D, z, dt_bias, ssm_state, cu_seqlens_q, seq_lens, state_slots, y, num_tokens, num_seqs, x_pitch, dt_pitch, B_pitch,
                          C_pitch, z_pitch, CHANNELS: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
                          DECODE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    begin, end, slot, fresh = sequence(tl.program_id(0), cu_seqlens_q, seq_lens, state_slots, num_tokens, num_seqs, DECODE)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    there = c < CHANNELS
    x_pitch = aligned(x_pitch, x, CHANNELS)
    dt_pitch = aligned(dt_pitch, dt, CHANNELS)
    B_pitch = aligned(B_pitch, B, N)
    C_pitch = aligned(C_pitch, C, N)
    if z is not None:
        z_pitch = aligned(z_pitch, z, CHANNELS)
    if slot >= 0:
        mask = there[:, None] & (n < N)[None, :]
        at = ssm_state + slot * (CHANNELS * N) + c[:, None] * N + n[None, :]
        h = tl.load(at, mask=mask & (fresh == 0), other=0.0)
        a = tl.load(A + c[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)
        for t in range(begin, end):
            now = tl.load(x + t * x_pitch + c, mask=there, other=0.0).to(tl.float32)
            step = tl.load(dt + t * dt_pitch + c, mask=there, other=0.0).to(tl.float32)
            if dt_bias is not None:
                step += tl.load(dt_bias + c, mask=there, other=0.0).to(tl.float32)
            if SOFTPLUS:
                step = softplus(step)
            b = tl.load(B + t * B_pitch + n, mask=n < N, other=0.0).to(tl.float32)
            out_of = tl.load(C + t * C_pitch + n, mask=n < N, other=0.0).to(tl.float32)
            h = h * tl.exp(step[:, None] * a) + (now * step)[:, None] * b[None, :]
            out = tl.sum(h * out_of[None, :], 1)
            if D is not None:
                out += now * tl.load(D + c, mask=there, other=0.0).to(tl.float32)
            if z is not None:
                out *= activate(tl.load(z + t * z_pitch + c, mask=there, other=0.0).to(tl.float32), "silu")
            tl.store(y + t * CHANNELS + c, out.to(y.dtype.element_ty), mask=there)
        tl.store(at, h, mask=mask)
    else:
        for t in range(begin, end):
            tl.store(y + t * CHANNELS + c, tl.zeros([BLOCK_C], y.dtype.element_ty), mask=there)


@claims("selective_scan", "triton")
def selective_scan(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    channels, n = args["A"].shape
    if not recurrent(call, "ssm_state"):
        return []
    given = operands(call, ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "ssm_state"), ("x", "dt", "B", "C", "z"))
    constants = {"CHANNELS": channels, "N": n, "SOFTPLUS": args["softplus"], "BLOCK_N": power_of_two(n), "DECODE": decodes(steps)}
    constants |= {} if "z_pitch" in given else {"z_pitch": 0}
    found = []
    for rank, (size, warps) in enumerate(((512, 2), (1024, 4), (2048, 4))):
        block_c = min(power_of_two(channels), max(16, size // power_of_two(n)))
        grid = (sequences(call, steps), (channels, block_c))
        functions = [selective_walk_kernel, aligned, sequence, softplus, activate]
        found.append(Candidate(f"walk_c{block_c}", (launch(call, functions, given, constants | {"BLOCK_C": block_c}, grid, num_warps=warps),), rank=rank))
    return list({c.name: c for c in found}.values())
