"""From logits to tokens. R rows, V vocabulary.

Randomness is counter-based: the noise of a token is a hash (SplitMix64; Steele, Lea and Flood 2014) of the request's seed, the step and
the token's id, and the token with the largest log-probability plus Gumbel noise is an exact draw. What a row gets therefore depends on
nothing else in its batch.
"""

from __future__ import annotations

import torch

from .dialect import op

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def gumbel(seed: torch.Tensor, step: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, a pure function of seed [R] (int64), step [R] and token ids ([V] or [R, K])."""
    stream = _mix(_mix(seed + _GOLDEN) + step.long() * _GOLDEN)
    bits = _mix(stream[:, None] + ids * _GOLDEN)
    # Small values of −log(1 − u) decide a draw: u near 0 keeps its full relative precision as a float.
    # A u that rounds to 1 would hide a token for good.
    uniform = ((((bits >> 11) & 0x1FFFFFFFFFFFFF).float() + 0.5) * 2.0**-53).clamp(max=1 - 2.0**-24)
    return -(-torch.log1p(-uniform)).log()


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer; shifts are logical, products wrap."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _FIRST
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@op("sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor step) -> Tensor",
    fake=lambda logits, *rest: logits.new_empty(logits.shape[0], dtype=torch.int32))  # fmt: skip
def sample(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, seed: torch.Tensor,
           step: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """A token of each row of logits [R, V] → [R] int32; −1 where the largest logit is not finite.

    temperature 0 takes the most probable token. Else: the `top_k` [R] (0: all) most probable, of these the fewest whose mass reaches
    `top_p` [R], of these all with at least `min_p` [R] times the largest probability; among equal logits the lower id comes first.
    seed [R, 2] int32, low and high half; step [R] int32.
    """
    exact = logits.float()
    best = exact.max(-1).values
    scores = (exact - best[:, None]) / torch.where(temperature > 0, temperature, 1.0)[:, None]
    order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    kept = (rank < top_k[:, None]) | (top_k[:, None] == 0) & (rank >= 0)
    weight = order.values.double().exp().masked_fill(~kept, 0.0)
    before = torch.nn.functional.pad(weight.cumsum(-1)[:, :-1], (1, 0)) / weight.sum(-1, keepdim=True)
    kept &= (before < top_p[:, None]) | (top_p[:, None] >= 1) | (rank == 0)
    kept &= order.values >= min_p.log()[:, None]
    noise = gumbel(seed.contiguous().view(torch.int64)[:, 0], step, order.indices)
    drawn = order.indices.gather(1, (order.values + noise).masked_fill(~kept, float("-inf")).argmax(-1, keepdim=True))[:, 0]
    tokens = torch.where(temperature > 0, drawn, exact.argmax(-1))
    return torch.where(best.isfinite(), tokens, -1).int()
