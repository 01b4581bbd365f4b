"""Logits processing against transformers' processors, or a few lines of numpy where there is none: one row after the other."""

import itertools
from array import array
from collections import defaultdict

import msgspec
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import logits_process as hf

from ingot.runtime.batch import StepBatch, StepLayout, StepSize
from ingot.runtime.logit_rules import LogitEdits, LogitRules
from ingot.runtime.logits import DeviceEdits, LogitsProcessor
from ingot.runtime.records import SAMPLING, sampling_record
from ingot.runtime.request import Request, RequestError, SamplingParams, Sequence
from ingot.runtime.sampler import Sampler, SamplingRows, sample

VOCAB, EOS = 97, (7,)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NO_PAGES = StepLayout((), slots=False, num_samples=16)
WORDS = [[3], [4, 5], [5, 5], [1, 2, 3], [2, 2, 2, 2]]

EXAMPLES: dict[str, SamplingParams] = {
    "nothing": SamplingParams(),
    "repetition": SamplingParams(repetition_penalty=1.3),
    "less repetition": SamplingParams(repetition_penalty=0.7),
    "presence": SamplingParams(presence_penalty=0.9),
    "frequency": SamplingParams(frequency_penalty=-0.4),
    "penalties": SamplingParams(repetition_penalty=1.7, presence_penalty=-0.6, frequency_penalty=1.1),
    "bias": SamplingParams(logit_bias={3: 5.5, 7: -100, 60: 0.25}),
    "min_tokens": SamplingParams(min_tokens=4, stop_token_ids=[9, 11]),
    "ignored eos": SamplingParams(min_tokens=4, ignore_eos=True, stop_token_ids=[11]),
    "bad_words": SamplingParams(bad_words=["as WORDS"]),
    "allowed": SamplingParams(allowed_token_ids=[2, 3, 5, 5, 40]),
    "all": SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, logit_bias={2: 1.5, 5: -2}, min_tokens=6, bad_words=["as WORDS"],
                          allowed_token_ids=range(1, 50)),
}  # fmt: skip


def expected(params: SamplingParams, prompt: list[int], output: list[int], logits: np.ndarray) -> np.ndarray:
    """In the order that `logits.py` names, each step as transformers does it."""
    ids, scores = torch.tensor([prompt + output]), torch.tensor(logits)[None]
    if params.logit_bias:
        scores = hf.SequenceBiasLogitsProcessor({(t,): float(b) for t, b in params.logit_bias.items()})(ids, scores)
    if params.bad_words:
        scores = hf.NoBadWordsLogitsProcessor(WORDS)(ids, scores)
    if params.min_tokens:
        stops = sorted({*params.stop_token_ids, *(() if params.ignore_eos else EOS)})
        scores = hf.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, stops)(ids, scores)
    if params.repetition_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    row = scores[0].numpy().copy()
    counts = np.bincount(output, minlength=VOCAB)
    row -= (params.frequency_penalty * counts + params.presence_penalty * (counts > 0)).astype(np.float32)
    if params.allowed_token_ids is not None:
        row[[t for t in range(VOCAB) if t not in params.allowed_token_ids]] = -np.inf
    return row


def sequence(params: SamplingParams, prompt: list[int], row: int) -> Sequence:
    rules = LogitRules.of(params, EOS, WORDS if params.bad_words else [], VOCAB)
    return Sequence(Request("r", prompt, params), 0, (0,), 16, array("i", prompt), b"", rules=rules, row=row)


def few_tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(1, 7, count).tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_every_row_is_as_if_it_were_alone(device):
    """All examples in one batch, over steps in which the newest token is known to the device alone; rows change, some start again."""
    rng = np.random.default_rng(0)
    processor = LogitsProcessor(len(EXAMPLES), len(EXAMPLES), VOCAB, torch.device(device))
    lines = rng.permutation(len(EXAMPLES)).tolist()
    running = [sequence(p, few_tokens(rng, 1 + i % 5), line) for (i, p), line in zip(enumerate(EXAMPLES.values()), lines, strict=True)]
    banned = 0
    for step in range(12):
        order = rng.permutation(len(running)).tolist()
        taking_part = [running[i] for i in order[: len(order) - step % 3]]
        logits = torch.tensor(rng.normal(0, 3, (len(taking_part), VOCAB)), dtype=torch.float32, device=device)
        before = logits.clone()
        newest = torch.tensor([s.token_ids[-1] for s in taking_part], device=device)
        for seq in taking_part:  # of a sequence that decodes the host does not know the newest token
            if seq.counted or seq.rules is None or seq.rules.penalties is None:
                seq.token_ids[-1] = VOCAB + 1
        edits = LogitEdits.pack([(r, s, s.num_output) for r, s in enumerate(taking_part)])
        for seq, token in zip(taking_part, newest.tolist(), strict=True):
            seq.token_ids[-1] = token
        edits = DeviceEdits(LogitEdits(edits.buffer.copy()), torch.device(device))
        processed = processor.process(logits, edits, newest)
        assert torch.equal(logits, before)
        for seq, raw, found in zip(taking_part, logits.cpu().numpy(), processed.cpu().numpy(), strict=True):
            wanted = expected(seq.request.params, [*seq.token_ids[: seq.num_prompt]], [*seq.token_ids[seq.num_prompt :]], raw)
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
            banned += np.isinf(wanted).sum()
        tokens = few_tokens(rng, len(taking_part))
        processor.count(edits, torch.tensor(tokens, device=device, dtype=torch.int32))
        for seq, token in zip(taking_part, tokens, strict=True):
            seq.token_ids.append(token)
        again = running[step]  # preempted, and admitted in another's row
        other = running[step - 1]
        again.row, other.row, again.counted, other.counted = other.row, again.row, False, False
    assert banned > 300


def test_penalties_are_worked_on_in_parts(monkeypatch):
    rng = np.random.default_rng(1)
    running = [sequence(EXAMPLES["penalties"], few_tokens(rng, 4), i) for i in range(7)]
    logits = torch.tensor(rng.normal(0, 3, (7, VOCAB)), dtype=torch.float32)
    edits = DeviceEdits(LogitEdits.pack([(r, s, 0) for r, s in enumerate(running)]), torch.device("cpu"))
    whole = LogitsProcessor(7, 7, VOCAB, torch.device("cpu")).process(logits, edits, logits.argmax(-1))
    monkeypatch.setattr("ingot.runtime.logits._CHUNK", 2 * VOCAB)
    assert torch.equal(LogitsProcessor(7, 7, VOCAB, torch.device("cpu")).process(logits, edits, logits.argmax(-1)), whole)


def test_no_rules_no_edits():
    assert LogitRules.of(SamplingParams(min_tokens=3, ignore_eos=True), EOS, [], VOCAB) is None
    waiting = sequence(EXAMPLES["min_tokens"], [1], 0)
    assert LogitEdits.pack([(0, waiting, 3)]) is not None
    assert LogitEdits.pack([(0, waiting, 4), (1, sequence(SamplingParams(), [1], 1), 0)]) is None
    assert LogitEdits.pack([]) is None


def rows_of(params: list[SamplingParams]) -> SamplingRows:
    return SamplingRows.from_batch(batch_of(params))


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_tokens_are_drawn_from_the_processed_and_scored_by_the_models(temperature):
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    processed = torch.full_like(logits, float("-inf"))
    processed[torch.arange(5), torch.tensor([3, 1, 4, 1, 5])] = -2.5
    sampled = sample(logits, rows_of([SamplingParams(temperature=temperature, logprobs=2)] * 5), processed)
    assert sampled.token_ids.tolist() == [3, 1, 4, 1, 5]
    logprobs = logits.log_softmax(-1)
    torch.testing.assert_close(sampled.logprobs, logprobs[torch.arange(5), sampled.token_ids.long()])
    torch.testing.assert_close(sampled.top_logprobs, logprobs.topk(2).values)


def test_nothing_left_is_told_from_a_damaged_model():
    logits = torch.zeros(3, VOCAB)
    logits[1, 2] = float("nan")
    processed = logits.clone()
    processed[0] = float("-inf")
    for params in itertools.product([0, 1.0], [None, 1]):
        rows = rows_of([SamplingParams(temperature=params[0], logprobs=params[1])] * 3)
        tokens = sample(logits, rows, processed).token_ids.tolist()
        assert tokens[:2] == [-2, -1]
        assert tokens[2] >= 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {97: 1}}, "logit_bias: token 97 is not in the vocabulary of 97"),
        ({"allowed_token_ids": [1, 99]}, "allowed_token_ids: token 99"),
        ({"stop_token_ids": [97]}, "stop_token_ids: token 97"),
        ({"allowed_token_ids": [7, 3], "min_tokens": 1, "bad_words": ["as WORDS"]}, "allowed_token_ids: bad_words and min_tokens forbid every one"),
    ],
)
def test_rules_that_cannot_be_kept(params, message):
    with pytest.raises(RequestError, match=message):
        sequence(SamplingParams(**params), [1], 0)


class Calls(TorchDispatchMode):
    """The torch calls made within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def batch_of(params: list[SamplingParams], edits: LogitEdits | None = None) -> StepBatch:
    batch = StepBatch(NO_PAGES, StepSize(len(params), len(params), len(params), 256))
    records = np.frombuffer(b"".join(sampling_record(p, i) for i, p in enumerate(params)), SAMPLING)
    for name in SAMPLING.names:
        batch.arrays[name][:] = records[name]
    batch.arrays["logits_rows"][:] = np.arange(len(params))
    batch.edits = edits
    return batch


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_p=0.9, logprobs=1)], ids=["greedy", "drawn"])
def test_without_rules_a_step_makes_the_same_calls(params):
    batch, logits, ids = batch_of([params] * 4), torch.randn(4, VOCAB), torch.arange(4, dtype=torch.int32)
    sampler = Sampler(4, 4, VOCAB, torch.device("cpu"))
    with Calls() as with_sampler:
        sampler(logits, batch, ids)
    with Calls() as alone:
        sample(logits, SamplingRows.from_batch(batch))
    assert with_sampler.names == alone.names
    edits = LogitEdits.pack([(0, sequence(EXAMPLES["bias"], [1], 0), 0)])
    with Calls() as with_rules:
        sampler(logits, batch_of([params] * 4, edits), ids)
    assert len(with_rules.names) > len(alone.names)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_the_device_is_not_waited_for():
    running = [sequence(p, [1, 2, 3, i], i) for i, p in enumerate(EXAMPLES.values())]
    edits = LogitEdits.pack([(r, s, 0) for r, s in enumerate(running)])
    batch = batch_of([SamplingParams(temperature=0.8, top_p=0.9, logprobs=2)] * len(running), edits)
    logits, ids, buffer = torch.randn(len(running), VOCAB).cuda(), torch.arange(len(running), dtype=torch.int32).cuda(), torch.from_numpy(batch.buffer).cuda()
    sampler = Sampler(len(running), len(running), VOCAB, torch.device("cuda"))
    sampler(logits, batch, ids, buffer)  # the counts are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = sampler(logits, batch, ids, buffer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (sampled.token_ids >= 0).all()


class Words:
    """A tokenizer, as far as rules and detokenizers need one."""

    def spellings(self, word: str) -> list[list[int]]:
        return WORDS

    texts = defaultdict(lambda: ".")


def reference(logits, params: SamplingParams, prompt: list[int]) -> list[int]:
    """Greedy tokens, the model's logits given."""
    output: list[int] = []
    while len(output) < params.max_tokens:
        output.append(int(expected(params, prompt, output, logits(prompt + output)).argmax()))
        if output[-1] in params.stop_token_ids or (output[-1] in EOS and not params.ignore_eos):
            break
    return output


CUTS = [{}, {"chunk": 16}, {"tokens": 88}, {"tokens": 88, "chunk": 16, "enable_prefix_caching": False}]


@pytest.fixture(scope="module")
def asked(recall) -> list[Request]:
    """Every example twice over, with prompts of few distinct tokens, and biases that make rules matter."""
    rng = np.random.default_rng(5)
    requests = []
    for i, params in enumerate([*EXAMPLES.values()] * 2):
        often = params.logit_bias or (dict.fromkeys(range(1, 8), 6.0) if params.bad_words or params.min_tokens or params.frequency_penalty else {})
        params = msgspec.structs.replace(params, temperature=0, max_tokens=22, logit_bias=often)
        requests.append(Request(f"r{i}", few_tokens(rng, int(rng.integers(1, 30))), params))
    return requests


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_greedy_requests_with_rules_do_not_depend_on_their_company(recall, asked, cut):
    engine = recall.engine("full and window", eos=EOS, tokenizer=Words(), **cut)
    found = recall.tokens(engine, asked)
    assert found == {(r.id, 0): reference(engine.executor.logits, r.params, r.prompt_token_ids) for r in asked}
    assert (engine.stats().preemptions > 0) == ("tokens" in cut)
    plain = {(r.id, 0): recall.greedy(engine, r.prompt_token_ids, 22)[: len(found[r.id, 0])] for r in asked}
    assert sum(found[k] != plain[k] for k in found) > 15  # the rules do something


def test_seeded_requests_with_rules_do_not_depend_on_their_company(recall, asked):
    asked = [Request(r.id, r.prompt_token_ids, msgspec.structs.replace(r.params, temperature=0.9, seed=i, n=1 + i % 2, top_k=30)) for i, r in enumerate(asked)]
    alone = recall.tokens(recall.engine(eos=EOS, tokenizer=Words()), asked, together=False)
    for cut in CUTS[2:]:
        assert recall.tokens(recall.engine(eos=EOS, tokenizer=Words(), **cut), asked) == alone


def test_when_no_token_is_left_the_request_says_so(recall):
    engine = recall.engine(tokenizer=Words())
    params = SamplingParams(temperature=0, allowed_token_ids=[5], bad_words=["as WORDS"])
    other = recall.prompts(1)[0]
    deltas = recall.run(engine, [Request("r", [1, 2], params), Request("other", other, SamplingParams(temperature=0, max_tokens=5))])
    assert [d.token_ids for d in deltas["r", 0]] == [[5], []]
    assert deltas["r", 0][-1].finish_reason == "error"
    assert "bad_words and allowed_token_ids forbid every one" in deltas["r", 0][-1].stop_reason
    assert [t for d in deltas["other", 0] for t in d.token_ids] == recall.greedy(engine, other, 5)


def test_words_need_a_tokenizer(recall):
    with pytest.raises(RequestError, match="bad_words strings need a tokenizer"):
        recall.engine().add(Request("r", [1], SamplingParams(bad_words=["x"])))


def test_a_batch_takes_its_edits_along():
    seq = sequence(EXAMPLES["all"], [1, 2, 3], 0)
    batch = StepBatch(NO_PAGES, StepSize(1, 1, 1, 256))
    batch.buffer[8:] = 5
    batch.edits = LogitEdits.pack([(0, seq, 0)])
    again = StepBatch.from_bytes(NO_PAGES, batch.to_bytes())
    for name, values in batch.edits.arrays.items():
        np.testing.assert_array_equal(again.edits.arrays[name], values)
    batch.reset(batch.size)
    assert batch.edits is None
    assert StepBatch.from_bytes(NO_PAGES, batch.to_bytes()).edits is None
