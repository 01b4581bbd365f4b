"""Latents and the keys that all heads share, to their places in the paged cache: as they are, or normed and rotated on the way."""

from __future__ import annotations

import triton
import triton.language as tl

from ..dims import plus
from ..kernel import Call, Candidate, Operand, Steps, claims
from ..target import Target
from .rotary import rotation, style_constants
from .source import launch, power_of_two, supported


@triton.jit
def latent_write_kernel(latent, rope, latent_cache, slot_mapping, L: tl.constexpr, R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
                        PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        at = latent_cache + slot * (L + R)  # one head: pages are rows in order
        c = tl.arange(0, BLOCK_L)
        tl.store(at + c, tl.load(latent + token * L + c, mask=c < L).to(latent_cache.dtype.element_ty), mask=c < L)
        if rope is not None:
            r = tl.arange(0, BLOCK_R)
            tl.store(at + L + r, tl.load(rope + token * R + r, mask=r < R).to(latent_cache.dtype.element_ty), mask=r < R)


@triton.jit
def latent_rope_write_kernel(q, kv, cos, sin, weight, latent_cache, slot_mapping, straight, turned, Q: tl.constexpr, Q_BEGIN: tl.constexpr,
                             Q_STEP: tl.constexpr, R_BEGIN: tl.constexpr, R_STEP: tl.constexpr, KV: tl.constexpr, KV_BEGIN: tl.constexpr,
                             H: tl.constexpr, NOPE: tl.constexpr, L: tl.constexpr, R: tl.constexpr, TABLE: tl.constexpr, STYLE: tl.constexpr,
                             HALF: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
                             BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows of q and kv have Q and KV elements. The first program of a token takes its latent and key, the others some heads of its queries each."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_R)
    own, partner, sign, column = rotation(j, R, STYLE, HALF)
    co = tl.load(cos + token * TABLE + column, mask=j < R, other=1.0).to(tl.float32)
    si = tl.load(sin + token * TABLE + column, mask=j < R, other=0.0).to(tl.float32) * sign
    if tl.program_id(1) == 0:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot >= 0:
            at = kv + token * KV + KV_BEGIN
            to = latent_cache + slot * (L + R)  # one head: pages are rows in order
            c = tl.arange(0, BLOCK_L)
            x = tl.load(at + c, mask=c < L, other=0.0).to(tl.float32)
            x *= tl.rsqrt(tl.sum(x * x, 0) / L + EPS) * (tl.load(weight + c, mask=c < L, other=0.0).to(tl.float32) + OFFSET)
            tl.store(to + c, x.to(latent_cache.dtype.element_ty), mask=c < L)
            x = tl.load(at + L + own, mask=j < R, other=0.0).to(tl.float32)
            y = tl.load(at + L + partner, mask=j < R, other=0.0).to(tl.float32)
            tl.store(to + L + j, (x * co + y * si).to(latent_cache.dtype.element_ty), mask=j < R)
    else:
        head = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        at = q + token * Q + Q_BEGIN + head * Q_STEP
        n = tl.arange(0, BLOCK_N)[None, :]
        inside = (head < H) & (n < NOPE)
        tl.store(straight + (token * H + head) * NOPE + n, tl.load(at + n, mask=inside), mask=inside)
        inside = (head < H) & (j < R)[None, :]
        at = q + token * Q + R_BEGIN + head * R_STEP
        x = tl.load(at + own[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(turned + (token * H + head) * R + j[None, :], (x * co[None, :] + y * si[None, :]).to(turned.dtype.element_ty), mask=inside)


@claims("latent_write", "triton")
def latent_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    latent, rope = call.args["latent"], call.args["rope"]
    if not supported(call, target):
        return []
    tokens, width = latent.shape
    r = 0 if rope is None else rope.shape[1]
    operands = {n: Operand(arg=n) for n in ("latent", "rope", "latent_cache", "slot_mapping")}
    constants = {"L": width, "R": r, "BLOCK_L": power_of_two(width), "BLOCK_R": power_of_two(r)}
    return [Candidate("tokens", (launch(call, [latent_write_kernel], operands, constants, ((tokens, 1),), num_warps=2),))]


@claims("latent_rope_write", "triton")
def latent_rope_write(call: Call, steps: Steps, target: Target) -> list[Candidate]:
    args = call.args
    if not supported(call, target):
        return []
    (tokens, heads, nope), width, r = call.results[0].shape, args["weight"].shape[0], call.results[1].shape[2]
    operands = {n: Operand(arg=n) for n in ("q", "kv", "cos", "sin", "weight", "latent_cache", "slot_mapping")}
    operands |= {"straight": Operand(out=0), "turned": Operand(out=1)}
    (q_begin, q_step), (r_begin, r_step) = args["straight"], args["turned"]
    constants = {"Q": args["q"].shape[1], "Q_BEGIN": q_begin, "Q_STEP": q_step, "R_BEGIN": r_begin, "R_STEP": r_step, "KV": args["kv"].shape[1],
                 "KV_BEGIN": args["kv_begin"], "H": heads, "NOPE": nope, "L": width, "R": r, "EPS": args["eps"], "OFFSET": args["offset"],
                 "BLOCK_N": power_of_two(nope), "BLOCK_L": power_of_two(width), "BLOCK_R": power_of_two(r)}  # fmt: skip
    constants |= style_constants(args["style"], args["cos"].shape[-1])
    found: dict[str, Candidate] = {}
    for rank, size in enumerate((1024, 4096) if steps.max_tokens <= 64 else (4096, 1024)):  # few tokens need many small programs
        block_h = min(power_of_two(heads), max(1, size // power_of_two(nope + r)))
        grid = ((tokens, 1), (plus(block_h, heads), block_h))
        one = launch(call, [latent_rope_write_kernel, rotation], operands, constants | {"BLOCK_H": block_h}, grid)
        found.setdefault(f"h{block_h}", Candidate(f"h{block_h}", (one,), rank=rank))
    return list(found.values())
