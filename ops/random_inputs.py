"""Seeded random arguments for a dialect call: what kernels are gated and timed on. Never zeros; index arrays are consistent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from . import dummy, formats
from .dims import Dim, evaluate
from .kernel import Call, Steps, Tensor

_PERIOD = (1 << 22) - 3
"""A prime, so that no two rows of a weight are alike."""
_PARTS = {"weight": "weight", "scale": "scale", "zero": "zero"} | {f"{part[0]}_{side}": part for part in ("weight", "scale", "zero") for side in ("in", "out")}
"""Of quantized weights, by the names of arguments."""
_SCALES = frozenset({"k_scale", "v_scale", "k_static", "v_static", "input_scale"})


def step_sizes(steps: Steps, tokens: int, prompts: int = 3) -> dict[str, int]:
    """T, S, R of a step of about `tokens` tokens that the variant may see, with at most so many prompts."""
    t = steps.max_tokens if steps.exact else min(tokens, steps.max_tokens)
    s = t if steps.max_num_new == 1 else min(prompts, steps.max_seqs, t)
    return {"T": t, "S": s, "R": t if steps.exact else min(s, steps.max_rows)}


def random_inputs(
    call: Call,
    steps: Steps,
    sizes: dict[str, int],
    device: torch.device | str,
    seed: int,
    context: int = 80,
    drawn: Mapping[str, torch.Tensor] | None = None,
    others: int | None = None,
) -> dict[str, Any]:
    """Arguments by name. The first sequence has `context` cached tokens, others at most `others` (None: as many), on shuffled pages.

    Activations are N(0, 1), weights N(0, 1/K); what is `drawn` already stays as it is.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    batch = _batch(sizes, steps.page_size, context, context if others is None else others, generator)
    if isinstance(call.args.get("indices"), Tensor):
        batch["indices"] = _chosen(batch["positions"], int(batch["seq_lens"].max()), generator)
    groups = {n: batch["num_pages"] for n in _symbols(call) if n.startswith("N_")} | {n: batch["width"] for n in _symbols(call) if n.startswith("P_")}
    full = {**sizes, **groups}
    drawn = drawn or {}
    return {name: drawn[name] if name in drawn else _value(name, arg, full, batch, call, device, generator) for name, arg in call.args.items()}


def _symbols(call: Call) -> set[str]:
    tensors = [a for a in call.args.values() if isinstance(a, Tensor)]
    return {n for t in tensors for d in t.shape if isinstance(d, dict) for n in d}


def _batch(sizes: dict[str, int], page_size: int, context: int, others: int, generator: torch.Generator) -> dict[str, Any]:
    tokens, seqs = sizes["T"], sizes["S"]
    cuts = torch.sort(torch.randperm(tokens - 1, generator=generator)[: seqs - 1] + 1).values if tokens > seqs else torch.arange(1, seqs)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), cuts, torch.tensor([tokens])])
    cached = torch.randint(0, others + 1, (seqs,), generator=generator)
    cached[0] = context
    lens = starts.diff() + cached
    held = (lens + page_size - 1) // page_size + 1
    width, count = int(held.max()), int(held.sum())
    pages = torch.zeros(seqs, width, dtype=torch.long)
    pages[torch.arange(width) < held[:, None]] = torch.randperm(count, generator=generator)
    positions = torch.cat([torch.arange(int(c), int(n)) for c, n in zip(cached, lens, strict=True)])
    seq = torch.repeat_interleave(torch.arange(seqs), starts.diff())
    slots = pages[seq, positions // page_size] * page_size + positions % page_size
    return {
        "cu_seqlens_q": starts, "seq_lens": lens, "page_table": pages, "slot_mapping": slots, "positions": positions,
        "state_slots": torch.randperm(count, generator=generator)[:seqs],
        "num_pages": count, "width": width, "pooling": torch.randint(0, 3, (seqs,), generator=generator),
    }  # fmt: skip


def _chosen(positions: torch.Tensor, farthest: int, generator: torch.Generator) -> torch.Tensor:
    """Of each token the positions up to its own, in any order, and then −1: [T, farthest]."""
    ranks = torch.rand(len(positions), farthest, generator=generator).masked_fill(torch.arange(farthest) > positions[:, None], 2.0)
    ranks, order = ranks.sort(-1)
    return torch.where(ranks < 2.0, order, -1)


def _value(name: str, arg: Any, sizes: dict[str, int], batch: dict[str, Any], call: Call, device: torch.device | str, generator: torch.Generator) -> Any:
    if not isinstance(arg, Tensor):
        return evaluate(arg, sizes) if isinstance(arg, dict) else arg
    shape = [evaluate(d, sizes) for d in arg.shape]
    if "format" in call.args and (part := _PARTS.get(name)) is not None:
        k = call.args["inner"] if name.endswith("_out") else call.args["x"].shape[-1]
        mean, std = formats.get(call.args["format"]).moments(part, k) if arg.dtype.is_floating_point else (0.0, 1.0)
        return dummy.generate(int(torch.randint(0, 1 << 30, (1,), generator=generator)), mean, std, tuple(shape), arg.dtype, device)
    if arg.dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(device)
    if not arg.dtype.is_floating_point:
        value = _like(batch[name], shape) if name in batch else torch.randint(0, _bound(name, call, sizes), shape, generator=generator)
        return value.to(arg.dtype).to(device).contiguous()
    if name in RANGES:
        low, high = RANGES[name]
        return (torch.rand(shape, generator=generator) * (high - low) + low).to(arg.dtype).to(device)
    if name in ("cos", "sin"):
        angle = torch.rand(shape, generator=generator) * 6.28
        return (angle.cos() if name == "cos" else angle.sin()).to(arg.dtype).to(device)
    if name in _SCALES:  # of quantized values: positive, so that values are near 1
        return (torch.rand(shape, generator=generator) + 0.5).mul_(1 / 64).to(arg.dtype).to(device)
    # drawn where they are used: the host generator is slow
    on = torch.Generator(device).manual_seed(int(torch.randint(0, 1 << 30, (1,), generator=generator)))
    count = math.prod(shape)
    values = torch.randn(min(count, _PERIOD), generator=on, device=device)  # of a large tensor these come again and again
    if name in ("weight", "w_in", "w_out") and len(shape) > 1 and call.op != "embedding":
        values *= shape[-1] ** -0.5
    values = values.to(arg.dtype)
    return (values if count <= _PERIOD else values.repeat(-(-count // _PERIOD))[:count]).view(shape)


def _like(value: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """`value`, or of a list of indices for each token the first, with −1 where a sequence has fewer."""
    if value.dim() < 2 or value.shape[1] == shape[1]:
        return value
    cut = torch.full(shape, -1, dtype=value.dtype)
    cut[:, : value.shape[1]] = value[:, : shape[1]]
    return cut


RANGES: dict[str, tuple[float, float]] = {
    "A": (-1.5, -0.1), "g": (-1.5, -0.05), "log_decay": (-1.5, -0.1), "decay": (0.05, 1.0), "beta": (0.0, 1.0), "wkv_state": (0.1, 1.0),
    "temperature": (0.3, 1.5), "top_p": (0.3, 1.0), "min_p": (0.0, 0.05),
}  # fmt: skip
"""Of arguments that are not N(0, 1)."""
_BOUNDS = {"top_k": 64, "step": 1000, "seed": 1 << 31}


def _bound(name: str, call: Call, sizes: dict[str, int]) -> int:
    """One more than the largest index that argument `name` may hold."""
    table: dict[str, tuple[str, int]] = {"ids": ("weight", 0), "rows": ("x", 0), "expert_ids": ("weight" if "weight" in call.args else "w_in", 0)}
    if name in _BOUNDS:
        return _BOUNDS[name]
    if name not in table:
        raise ValueError(f"no rule for the integer argument {name} of {call.op}: add one to random_inputs")
    other, dim = table[name]
    size: Dim = call.args[other].shape[dim]
    return evaluate(size, sizes)
