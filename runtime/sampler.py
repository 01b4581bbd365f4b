"""From logits to tokens, on CPU and CUDA alike, without waiting for the device.

A draw is the token with the largest log-probability plus its Gumbel noise (`ops.sampling.gumbel`), so that what a request gets
depends on nothing else in its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ingot.ops.sampling import gumbel

from .batch import Sampled, StepBatch
from .compiled_sampler import CompiledSampler
from .logit_rules import NONE_LEFT, NOT_FINITE
from .logits import DeviceEdits, LogitsProcessor

_CHUNK = 1 << 22  # logits worked on at once, which bounds the temporaries


def workspace_bytes(vocab_size: int) -> int:
    """Memory that sampling needs at most beside logits and results: eight numbers of 64 bits for each logit that is worked on at once."""
    return 8 * 8 * max(_CHUNK, vocab_size)


_FEW = 512
"""Candidates that a CPU tries for top-p before it sorts a vocabulary."""


@dataclass(frozen=True)
class SamplingRows:
    """How to sample each of R rows (`batch.SAMPLING`): tensors on the logits' device, and what the host knows of them."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor  # int64
    step: torch.Tensor
    target: torch.Tensor
    random: bool  # some row is not greedy
    plain: bool  # some random row has neither top-k nor top-p
    num_candidates: int  # that the rows with top-k or top-p need: the largest top_k; 0: no such row; −1: all tokens
    num_logprobs: int  # the most that a row asks for; −1: no row asks
    targets: bool  # some row has one

    @classmethod
    def from_batch(cls, batch: StepBatch, buffer: torch.Tensor | None = None) -> SamplingRows:
        """Rows of `batch`; `buffer` is its buffer on the device (default: the CPU)."""
        host = batch.arrays
        if buffer is None:
            buffer = torch.from_numpy(batch.buffer)

        def tensor(name: str, dtype: torch.dtype) -> torch.Tensor:
            field = batch.fields[name]
            return buffer[field.offset : field.offset + math.prod(field.shape)].view(dtype)

        random = host["temperature"] > 0
        nucleus = host["top_p"] < 1
        truncated = random & ((host["top_k"] > 0) | nucleus)
        unbounded = (random & nucleus & (host["top_k"] == 0)).any()
        return cls(
            temperature=tensor("temperature", torch.float32),
            top_k=tensor("top_k", torch.int32),
            top_p=tensor("top_p", torch.float32),
            min_p=tensor("min_p", torch.float32),
            seed=tensor("seed", torch.int64),
            step=tensor("step", torch.int32),
            target=tensor("target", torch.int32),
            random=bool(random.any()),
            plain=bool((random & ~truncated).any()),
            num_candidates=-1 if unbounded else int(host["top_k"].max(where=truncated, initial=0)),
            num_logprobs=int(host["num_logprobs"].max(initial=-1)),
            targets=bool((host["target"] >= 0).any()),
        )

    def chunk(self, begin: int, end: int) -> SamplingRows:
        return replace(self, **{k: v[begin:end] for k, v in vars(self).items() if isinstance(v, torch.Tensor)})  # type: ignore[arg-type]


class Sampler:
    """Samples the logits of steps, one after the other, as their batches say. With `plans`, compiled ones choose the tokens."""

    def __init__(self, num_seqs: int, num_rows: int, vocab_size: int, device: torch.device, plans: CompiledSampler | None = None) -> None:
        """`num_rows`: of logits, at most."""
        self._processor = LogitsProcessor(num_seqs, num_rows, vocab_size, device)
        self._plans = plans

    def __call__(self, logits: torch.Tensor, batch: StepBatch, input_ids: torch.Tensor, buffer: torch.Tensor | None = None) -> Sampled:
        """`logits` [R, V], R as padded; `input_ids` [T] of the step, and `buffer` of the batch, on the logits' device."""
        if buffer is None:
            buffer = torch.from_numpy(batch.buffer)
        if self._plans is not None and batch.plain:
            return Sampled(self._plans(logits, batch, buffer))  # as a rule; nothing else need be looked at
        rows = SamplingRows.from_batch(batch, buffer)
        if batch.edits is None:
            return sample(logits, rows, chosen=self._chosen(logits, batch, buffer))
        field = batch.fields["logits_rows"]
        newest = input_ids[buffer[field.offset : field.offset + batch.padded.num_rows]]
        edits = DeviceEdits(batch.edits, logits.device)
        processed = self._processor.process(logits, edits, newest)
        sampled = sample(logits, rows, processed, self._chosen(processed, batch, buffer))
        self._processor.count(edits, sampled.token_ids)
        return sampled

    def _chosen(self, logits: torch.Tensor, batch: StepBatch, buffer: torch.Tensor) -> torch.Tensor | None:
        return None if self._plans is None else self._plans(logits, batch, buffer)


def sample(logits: torch.Tensor, rows: SamplingRows, processed: torch.Tensor | None = None, chosen: torch.Tensor | None = None) -> Sampled:
    """One token for each row of `logits` [R, V] (float16, bfloat16 or float32), and the log-probabilities asked for.

    With `processed` [R, V] (`logits.LogitsProcessor`) tokens are drawn from it; log-probabilities are of `logits` nevertheless.
    `chosen` [R] int32 are tokens that were drawn already, as `ops.sampling.sample` does.
    """
    if rows.num_logprobs < 0 and processed is None:
        if chosen is not None and not rows.targets:
            return Sampled(chosen)
        if not rows.random:
            best, tokens = logits.max(-1)
            return Sampled(torch.where(best.isfinite(), tokens, -1).int())
    size = max(1, _CHUNK // logits.shape[1])
    if logits.shape[0] <= size:
        return _sample(logits, rows, processed, chosen)
    parts = []
    for b in range(0, logits.shape[0], size):
        end = b + size
        parts.append(_sample(logits[b:end], rows.chunk(b, end), *(None if t is None else t[b:end] for t in (processed, chosen))))
    return Sampled(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


def _sample(model_logits: torch.Tensor, rows: SamplingRows, processed: torch.Tensor | None, chosen: torch.Tensor | None) -> Sampled:
    model_logits = model_logits.float()
    if chosen is not None:
        finite, tokens = chosen >= 0, chosen.clamp(min=0).long()
    else:
        finite, tokens = _choose(model_logits if processed is None else processed, rows)
    if rows.targets:
        tokens = torch.where(rows.target >= 0, rows.target.long(), tokens)
    none: int | torch.Tensor = NOT_FINITE
    if processed is not None:
        none = torch.where(model_logits.amax(-1).isfinite(), NONE_LEFT, NOT_FINITE)
    if rows.num_logprobs < 0:
        return Sampled(torch.where(finite, tokens, none).int())
    distribution = model_logits.log_softmax(-1)  # a row is reduced in the same order however many there are
    logprobs = distribution.gather(1, tokens[:, None])[:, 0]
    tokens = torch.where(finite, tokens, none).int()
    if rows.num_logprobs == 0:
        return Sampled(tokens, logprobs)
    top = _largest(model_logits, min(rows.num_logprobs, model_logits.shape[1]))
    return Sampled(tokens, logprobs, top.int(), distribution.gather(1, top))


def _choose(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a row's largest logit is finite, and the row's token."""
    best, tokens = logits.max(-1)
    if rows.random:
        random = rows.temperature > 0
        scores = (logits - best[:, None]) / torch.where(random, rows.temperature, 1.0)[:, None]
        truncated = (rows.top_k > 0) | (rows.top_p < 1)
        if rows.plain:
            tokens = torch.where(random & ~truncated, _draw(scores, torch.arange(scores.shape[1], device=scores.device), rows), tokens)
        if rows.num_candidates:
            tokens = torch.where(random & truncated, _draw_truncated(scores, rows), tokens)
    return best.isfinite(), tokens


def _draw_truncated(scores: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """A draw from what top-k and top-p leave of `scores` [R, V], of which the best is 0."""
    vocab = scores.shape[1]
    weight = scores.exp().sum(-1, keepdim=True)
    if rows.num_candidates > 0:
        return _draw_candidates(scores, weight, _largest(scores, min(rows.num_candidates, vocab)), rows)
    if scores.is_cpu and vocab > _FEW:
        # A nucleus is small as a rule, and to look whether it is costs nothing here. On a GPU it would mean to wait.
        ids = _largest(scores, _FEW)
        mass = scores.gather(1, ids).exp().cumsum(-1)[:, -1] / weight[:, 0]
        bounded = (rows.top_k > 0) & (rows.top_k <= _FEW)
        if bool((bounded | (mass >= rows.top_p) | (rows.temperature == 0)).all()):
            return _draw_candidates(scores, weight, ids, rows)
    return _draw_candidates(scores, weight, _largest(scores, vocab), rows)


def _draw_candidates(scores: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """The draw, when nothing outside the first columns `ids` [R, K] is kept; `weight` [R, 1] is the sum of exp(scores)."""
    scores = scores.gather(1, ids)
    rank = torch.arange(ids.shape[1], device=ids.device)
    limited = rows.top_k[:, None] > 0
    scores = scores.masked_fill(limited & (rank >= rows.top_k[:, None]), float("-inf"))
    mass = scores.exp().cumsum(-1)
    weight = torch.where(limited, mass[:, -1:], weight)
    mass_before = torch.nn.functional.pad(mass[:, :-1], (1, 0)) / weight
    scores = scores.masked_fill((mass_before >= rows.top_p[:, None]) & (rank > 0), float("-inf"))
    return ids.gather(1, _draw(scores, ids, rows)[:, None])[:, 0]


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` largest of each row, in order; among equals the lower id, so that ties do not depend on `count` or the batch."""
    bits = scores.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # compares like the float
    last = scores.shape[1] - 1
    keys = (ordered.long() << 32) | torch.arange(last, -1, -1, device=scores.device)
    return last - (keys.topk(count).values & 0xFFFFFFFF)


def _draw(scores: torch.Tensor, ids: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Index of one column per row, with probability softmax(scores) over those within min-p of the best, which is 0. ids: [V] or [R, K]."""
    scores = scores.masked_fill(scores < rows.min_p.log()[:, None], float("-inf"))
    return (scores + gumbel(rows.seed, rows.step, ids)).argmax(-1)
