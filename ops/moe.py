"""Mixture of experts. T tokens, X experts, A active experts a token, D hidden, I expert intermediate."""

from __future__ import annotations

import torch

from . import formats
from .dialect import op
from .glu import ACTIVATIONS, GATES


@op("route(Tensor logits, int k, bool softmax, bool renormalize, float scale, ScalarType dtype) -> (Tensor, Tensor)",
    fake=lambda logits, k, softmax, renormalize, scale, dtype: (logits.new_empty(*logits.shape[:-1], k, dtype=dtype),
                                                                logits.new_empty(*logits.shape[:-1], k, dtype=torch.int64)), rowwise=True)  # fmt: skip
def route(logits: torch.Tensor, k: int, softmax: bool, renormalize: bool, scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest of logits [..., X]: weights [..., k] of `dtype`, largest first, and ids [..., k] (int64); among equal ones the lower id comes first.

    In float32: weights are the logits or, with `softmax`, their shares of the whole row; with `renormalize` these add up to `scale`.
    """
    exact = logits.float()
    best, ids = (t[..., :k] for t in exact.sort(dim=-1, descending=True, stable=True))
    weights = torch.exp(best - exact.logsumexp(-1, keepdim=True)) if softmax else best
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return (weights * scale).to(dtype), ids.contiguous()


@op("grouped_linear(Tensor x, Tensor weight, Tensor? bias, Tensor expert_ids, bool transposed) -> Tensor",
    fake=lambda x, weight, bias, expert_ids, transposed: x.new_empty(x.shape[0], weight.shape[2 if transposed else 1]), host_sync=True)  # fmt: skip
def grouped_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, expert_ids: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Row n of x [N, K] times the matrix of its expert expert_ids[n]: weight [X, O, K] ([X, K, O] if transposed), bias [X, O] → [N, O]."""
    out = x.new_zeros(x.shape[0], weight.shape[2 if transposed else 1])
    for e in expert_ids.unique().tolist():
        if not 0 <= e < weight.shape[0]:
            continue  # an id outside the table means "no expert", as routers that drop tokens say it
        rows = (expert_ids == e).nonzero().flatten()
        h = x[rows] @ (weight[e] if transposed else weight[e].t())
        out[rows] = h if bias is None else h + bias[e]
    return out


@op("moe(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, str act, bool gated, "
    "bool transposed, bool interleaved) -> Tensor", fake=lambda x, *rest: torch.empty_like(x), rowwise=True, host_sync=True)  # fmt: skip
def moe(x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor | None,
        w_out: torch.Tensor, b_out: torch.Tensor | None, act: str, gated: bool, transposed: bool, interleaved: bool) -> torch.Tensor:  # fmt: skip
    """Σ_a expert_weights[t, a] · expert_{expert_ids[t, a]}(x[t]) → [T, D] for x [T, D], ids and weights [T, A].

    An expert is w_out · GATES[act](gate, up), which is act(gate) · up for most, with w_in [X, 2I, D] = gate | up (pairs side by side if `interleaved`), or
    w_out · act(w_in x) with w_in [X, I, D] if not `gated`; w_out [X, D, I]. `transposed`: the last two dims swapped.
    """
    tokens, active = expert_ids.shape
    ids = expert_ids.reshape(-1)
    h = grouped_linear(x.repeat_interleave(active, 0), w_in, b_in, ids, transposed)
    if gated:
        gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
        h = GATES[act](gate, up)
    else:
        h = ACTIVATIONS[act](h)
    h = grouped_linear(h, w_out, b_out, ids, transposed)
    return (h.float() * expert_weights.reshape(-1, 1).float()).view(tokens, active, -1).sum(1).to(x.dtype)


@op("quantized_moe(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor w_in, Tensor s_in, Tensor? b_in, Tensor w_out, Tensor s_out, Tensor? b_out, "
    "str act, bool gated, str format) -> Tensor", fake=lambda x, *rest: torch.empty_like(x), rowwise=True, host_sync=True)  # fmt: skip
def quantized_moe(x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, w_in: torch.Tensor, s_in: torch.Tensor, b_in: torch.Tensor | None,
                  w_out: torch.Tensor, s_out: torch.Tensor, b_out: torch.Tensor | None, act: str, gated: bool, format: str) -> torch.Tensor:  # fmt: skip
    """`moe` with experts of codes w_in [X, 2I, D], w_out [X, D, I] and their scales, in a format whose layout is "rows". Rows of x are not rounded."""
    form = formats.get(format)

    def meant(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        parts = form.unpack({"weight": codes.flatten(0, 1), "scale": scale.flatten(0, 1)}, "rows", codes.shape[0] * codes.shape[1], codes.shape[2])
        return form.dequantize(parts).view(codes.shape).to(x.dtype)

    return moe(x, expert_ids, expert_weights, meant(w_in, s_in), b_in, meant(w_out, s_out), b_out, act, gated, False, False)
