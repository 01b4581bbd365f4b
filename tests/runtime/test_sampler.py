"""Draws against exact probabilities, filters against a plain reference, and independence of the batch."""

import math

import numpy as np
import pytest
import torch

from ingot.ops.sampling import gumbel
from ingot.runtime import sampler
from ingot.runtime.batch import StepBatch, StepLayout, StepSize
from ingot.runtime.records import SAMPLING, sampling_record
from ingot.runtime.request import SamplingParams
from ingot.runtime.sampler import SamplingRows, sample

NO_PAGES = StepLayout((), slots=False, num_samples=16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rows_of(params: list[SamplingParams], seeds: list[int], steps: list[int], targets: list[int] | None = None, device: str = "cpu") -> SamplingRows:
    batch = StepBatch(NO_PAGES, StepSize(1, 1, len(params), 256))
    records = np.frombuffer(b"".join(map(sampling_record, params, seeds)), SAMPLING).copy()
    records["step"] = steps
    if targets is not None:
        records["target"] = targets
    for name in SAMPLING.names:
        batch.arrays[name][:] = records[name]
    return SamplingRows.from_batch(batch, torch.from_numpy(batch.buffer).to(device))


def random_logits(rows: int, vocab: int, seed: int = 0, ties: bool = False) -> torch.Tensor:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2
    return (logits * 2).round() / 2 if ties else logits


def chi_square(tokens: torch.Tensor, probabilities: np.ndarray) -> tuple[float, float]:
    """The statistic over classes with at least 5 expected draws, the rest pooled, and a bound that one in 10⁵ exceeds."""
    expected = probabilities * len(tokens)
    counts = np.bincount(tokens.numpy(), minlength=len(probabilities))
    common = expected >= 5
    e, c = np.append(expected[common], expected[~common].sum()), np.append(counts[common], counts[~common].sum())
    e, c = e[e > 0], c[e > 0]
    df = len(e) - 1
    return float(((c - e) ** 2 / e).sum()), df * (1 - 2 / (9 * df) + 4.26 * math.sqrt(2 / (9 * df))) ** 3  # Wilson and Hilferty 1931


def kept(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, top-k, top-p and min-p, one token after the other; among equals the lower id first."""
    scaled = logits.double().numpy() / params.temperature
    order = sorted(range(len(scaled)), key=lambda i: (-logits[i].item(), i))
    if params.top_k > 0:
        order = order[: params.top_k]
    weights = np.exp(scaled - scaled.max())
    total, mass, nucleus = weights[order].sum(), 0.0, []
    for i in order:
        if nucleus and mass >= params.top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
    final = np.zeros(len(scaled))
    for i in nucleus:
        if weights[i] >= params.min_p * (1 - 1e-6):
            final[i] = weights[i]
    return final / final.sum()


FILTERS = [
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 500, "temperature": 1.7},
    {"top_p": 0.83},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7, "temperature": 1.3},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1, "temperature": 0.8},
    {"top_p": 0.95, "min_p": 0.05},
]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_follow_the_filtered_distribution(options, ties):
    params = SamplingParams(**options)
    logits = random_logits(1, 61, seed=3, ties=ties)
    draws = 12000
    # half of the draws by seed, half by step: both must be independent
    seeds, steps = [*range(draws // 2), *[77] * (draws // 2)], [*[5] * (draws // 2), *range(draws // 2)]
    tokens = sample(logits.expand(draws, -1), rows_of([params] * draws, seeds, steps)).token_ids
    probabilities = kept(logits[0], params)
    assert set(tokens.tolist()) <= set(np.flatnonzero(probabilities).tolist())
    if (probabilities > 0).sum() > 1:
        for half in (tokens[: draws // 2], tokens[draws // 2 :]):
            statistic, bound = chi_square(half, probabilities)
            assert statistic < bound


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_its_batch(device):
    rng = np.random.default_rng(1)
    count = 96
    params = [SamplingParams(**FILTERS[i % len(FILTERS)]) if i % 5 else SamplingParams(temperature=0, top_k=3) for i in range(count)]
    seeds, steps = rng.integers(0, 2**63, count).tolist(), rng.integers(0, 5000, count).tolist()
    logits = random_logits(count, 301, seed=4, ties=True).to(device)
    together = sample(logits, rows_of(params, seeds, steps, device=device)).token_ids.tolist()
    alone = [sample(logits[i : i + 1], rows_of(params[i : i + 1], seeds[i : i + 1], steps[i : i + 1], device=device)).token_ids.item() for i in range(count)]
    assert alone == together
    order = rng.permutation(count).tolist()[:41]
    some = sample(logits[order], rows_of([params[i] for i in order], [seeds[i] for i in order], [steps[i] for i in order], device=device))
    assert some.token_ids.tolist() == [together[i] for i in order]


def test_large_steps_are_worked_on_in_parts(monkeypatch):
    count = 23
    params = [SamplingParams(**FILTERS[i % len(FILTERS)], logprobs=i % 4) for i in range(count)]
    logits = random_logits(count, 97, seed=8)
    rows = rows_of(params, list(range(count)), list(range(count)))
    whole = sample(logits, rows)
    monkeypatch.setattr(sampler, "_CHUNK", 97 * 5)
    for part, full in zip(sample(logits, rows), whole, strict=True):
        torch.testing.assert_close(part, full)


@pytest.mark.parametrize("scale", [0.1, 3.0], ids=["wide", "narrow"])
def test_a_few_candidates_are_enough_or_not(monkeypatch, scale):
    """top-p over a vocabulary much larger than `_FEW`: the same as after sorting all of it, and within the reference's nucleus."""
    vocab = 3 * sampler._FEW
    logits = random_logits(1, vocab, seed=9, ties=True) * scale
    params = SamplingParams(top_p=0.9)
    rows = rows_of([params] * 4000, list(range(4000)), [0] * 4000)
    tokens = sample(logits.expand(4000, -1), rows).token_ids
    nucleus = kept(logits[0], params)
    assert ((nucleus > 0).sum() > sampler._FEW) == (scale < 1)
    assert set(tokens.tolist()) <= set(np.flatnonzero(nucleus).tolist())
    statistic, bound = chi_square(tokens, nucleus)
    assert statistic < bound
    monkeypatch.setattr(sampler, "_FEW", vocab)
    assert torch.equal(sample(logits.expand(4000, -1), rows).token_ids, tokens)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_the_device_is_not_waited_for():
    logits = random_logits(12, 301, seed=4).cuda()
    rows = rows_of([SamplingParams(**f, logprobs=2) for f in FILTERS], list(range(12)), [0] * 12, [-1] * 11 + [4], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = sample(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sampled.token_ids[-1].item() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_the_argmax_in_any_company(dtype):
    logits = random_logits(9, 301, seed=5).to(dtype)
    best = logits.float().argmax(-1).tolist()
    greedy = SamplingParams(temperature=0, top_p=0.5)
    assert sample(logits, rows_of([greedy] * 9, [0] * 9, [0] * 9)).token_ids.tolist() == best
    mixed = sample(logits, rows_of([greedy, SamplingParams()] * 4 + [greedy], [3] * 9, [0] * 9)).token_ids.tolist()
    assert mixed[::2] == best[::2]
    assert mixed[1::2] != best[1::2]


def test_seeds_steps_and_tokens_give_unrelated_noise():
    seeds = torch.arange(200, dtype=torch.int64)
    steps = torch.zeros(200, dtype=torch.int32)
    ids = torch.arange(500)
    noise = gumbel(seeds, steps, ids)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.015)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    by_step = gumbel(torch.zeros(200, dtype=torch.int64), torch.arange(200, dtype=torch.int32), ids)
    for a in (noise, by_step):
        for x, y in [(a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a[2:, 1:], a[:-2, :-1])]:
            assert abs(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()) < 0.015
    assert len(torch.unique(noise)) > 0.97 * noise.numel()
    torch.testing.assert_close(gumbel(seeds[7:8], steps[:1], ids[None, 40:50]), noise[7:8, 40:50])


def test_logprobs_are_of_the_raw_distribution():
    logits = random_logits(6, 83, seed=6)
    raw = logits.double().log_softmax(-1)
    params = [SamplingParams(temperature=2.5, top_k=4, logprobs=n) if n is not None else SamplingParams(temperature=0) for n in (None, 0, 3, 5, None, 1)]
    targets = [-1, -1, -1, -1, 17, -1]
    sampled = sample(logits, rows_of(params, list(range(6)), [1] * 6, targets))
    tokens = sampled.token_ids.long()
    assert tokens[4] == 17
    torch.testing.assert_close(sampled.logprobs.double(), raw[torch.arange(6), tokens], atol=1e-5, rtol=0)
    values, ids = raw.topk(5)
    assert sampled.top_ids.tolist() == ids.tolist()
    torch.testing.assert_close(sampled.top_logprobs.double(), values, atol=1e-5, rtol=0)
    none = sample(logits, rows_of([SamplingParams()] * 6, list(range(6)), [1] * 6))
    assert (none.logprobs, none.top_ids, none.top_logprobs) == (None, None, None)
    chosen = sample(logits, rows_of([SamplingParams(logprobs=0)] * 6, list(range(6)), [1] * 6))
    assert chosen.top_ids is None
    assert chosen.logprobs.shape == (6,)
    assert sample(logits[:, :3], rows_of([SamplingParams(logprobs=9)] * 6, [0] * 6, [0] * 6)).top_ids.shape == (6, 3)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.5, "logprobs": 1}], ids=str)
def test_rows_that_are_not_finite_yield_no_token(options):
    logits = random_logits(5, 41, seed=7)
    logits[1, 3] = float("nan")
    logits[2] = float("-inf")
    logits[3, 5] = float("inf")
    logits[4, :40] = float("-inf")  # one token is left, which is fine
    tokens = sample(logits, rows_of([SamplingParams(**options)] * 5, list(range(5)), [0] * 5)).token_ids.tolist()
    assert tokens[0] >= 0
    assert tokens[1:] == [-1, -1, -1, 40]


def test_results_are_cut_and_brought_to_the_host():
    logits = random_logits(6, 41)
    sampled = sample(logits, rows_of([SamplingParams(temperature=0, logprobs=2)] * 6, [0] * 6, [0] * 6)).first(4).to_host()
    assert [type(a) for a in sampled] == [np.ndarray] * 4
    assert [a.shape for a in sampled] == [(4,), (4,), (4, 2), (4, 2)]
    assert [a.dtype.name for a in sampled] == ["int32", "float32", "int32", "float32"]
