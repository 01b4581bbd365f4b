"""Mixture of experts. T tokens, X experts, A active experts a token, D hidden, I expert intermediate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import formats
from .dialect import op
from .glu import ACTIVATIONS, GATES
from .quantized import round_activation


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
    return _mixture(x, expert_ids, expert_weights, w_in, b_in, w_out, b_out, act, gated, transposed, interleaved, lambda h: h)


def _mixture(x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor | None, w_out: torch.Tensor,
             b_out: torch.Tensor | None, act: str, gated: bool, transposed: bool, interleaved: bool,
             rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:  # fmt: skip
    """`rounded`: rows as they are multiplied."""
    tokens, active = expert_ids.shape
    ids = expert_ids.reshape(-1)
    h = grouped_linear(rounded(x).repeat_interleave(active, 0), w_in, b_in, ids, transposed)
    if gated:
        gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
        h = GATES[act](gate, up)
    else:
        h = ACTIVATIONS[act](h)
    h = grouped_linear(rounded(h), w_out, b_out, ids, transposed)
    return (h.float() * expert_weights.reshape(-1, 1).float()).view(tokens, active, -1).sum(1).to(x.dtype)


@op("quantized_moe(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor w_in, Tensor s_in, Tensor? z_in, Tensor? b_in, Tensor w_out, Tensor s_out, "
    "Tensor? z_out, Tensor? b_out, str act, bool gated, str format, str layout, str activation, int inner) -> Tensor",
    fake=lambda x, *rest: torch.empty_like(x), rowwise=True, host_sync=True)  # fmt: skip
def quantized_moe(x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, w_in: torch.Tensor, s_in: torch.Tensor, z_in: torch.Tensor | None,
                  b_in: torch.Tensor | None, w_out: torch.Tensor, s_out: torch.Tensor, z_out: torch.Tensor | None, b_out: torch.Tensor | None, act: str,
                  gated: bool, format: str, layout: str, activation: str, inner: int) -> torch.Tensor:  # fmt: skip
    """`moe` with experts [2I, D] and [D, I], I = `inner`, that their packed parts mean, codes w, scales s and zeros z, one expert after another along a
    first dim; rows are rounded as `activation` says before each product. Gate and up of an expert were packed one after the other, as in `quantized_linear`.
    """

    def meant(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, n: int, k: int, pieces: int) -> torch.Tensor:
        given = (("weight", codes), ("scale", scale), ("zero", zero))
        parts = {name: part.flatten(0, 1) for name, part in given if part is not None}
        w = formats.get(format).dequantize(formats.unpacked(parts, format, layout, len(codes) * n, k, len(codes) * pieces))
        return w.view(len(codes), n, k).to(x.dtype)

    pieces, width = 2 if gated else 1, x.shape[1]
    matrices = meant(w_in, s_in, z_in, pieces * inner, width, pieces), b_in, meant(w_out, s_out, z_out, width, inner, 1), b_out
    return _mixture(x, expert_ids, expert_weights, *matrices, act, gated, False, False, lambda h: round_activation(h, activation, None).to(x.dtype))
