"""Beam search against transformers', over the same tiny model and without an engine."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ingot.runtime.beam_search import BeamSearch
from ingot.runtime.request import Request, RequestError, SamplingParams

VOCAB = 23


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(12)  # sharp enough that beams differ, and not so sharp that none ends
    return model


def found(model: LlamaForCausalLM, prompt: list[int], search: BeamSearch[list[int]]) -> list[tuple[float, list[int]]]:
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    while beams:
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + tokens for tokens, _ in beams])).logits[:, -1].log_softmax(-1)
        best = logprobs.topk(min(search.num_candidates, VOCAB))
        reports = [(*beam, list(zip(i, p, strict=True))) for beam, i, p in zip(beams, best.indices.tolist(), best.values.tolist(), strict=True)]
        beams = [([*s.parent, s.token], s.score) for s in search.advance(reports)]
    return [(score, [*s.parent, s.token]) for score, s in search.answers]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.7])
def test_answers_are_those_of_transformers(model: LlamaForCausalLM, early_stopping, length_penalty) -> None:
    generator = torch.Generator().manual_seed(1)
    ended_early = 0
    for (width, stops), length in itertools.product([(2, [3, 8, 9, 20]), (3, [3, 5, 11, 1, 2]), (4, []), (6, [2, 3, 7])], [1, 14]):
        prompt = torch.randint(1, VOCAB, (4,), generator=generator).tolist()
        with torch.no_grad():
            wanted = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=torch.int64), num_beams=width, num_return_sequences=width, do_sample=False,
                max_new_tokens=length, length_penalty=length_penalty, early_stopping=early_stopping, eos_token_id=stops or None, pad_token_id=0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        search: BeamSearch[list[int]] = BeamSearch(width, length, frozenset(stops), length_penalty, early_stopping)
        answers = found(model, prompt, search)
        assert search.done
        assert [s for s, _ in answers] == pytest.approx(wanted.sequences_scores.tolist(), abs=1e-4)
        for (_, tokens), sequence in zip(answers, wanted.sequences[:, 4:].tolist(), strict=True):
            assert tokens == sequence[: len(tokens)]
            assert set(sequence[len(tokens) :]) <= {*stops[:1]}  # what transformers pads with
            ended_early += len(tokens) < length
    assert ended_early > 1 or length_penalty == 2.0  # which favours the longest


def search(executor, prompt: list[int], params: SamplingParams, stops: frozenset[int]) -> list[tuple[float, list[int]]]:
    """What an engine must find, computed without pages; logits are the recalling model's."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    state: BeamSearch[list[int]] = BeamSearch(params.beam_width, params.max_tokens, stops, params.length_penalty, params.early_stopping)
    while beams:
        reports = []
        for tokens, score in beams:
            logprobs = torch.from_numpy(executor.logits(prompt + tokens)).log_softmax(-1)
            best = logprobs.topk(min(state.num_candidates, len(logprobs)))
            reports.append((tokens, score, list(zip(best.indices.tolist(), best.values.tolist(), strict=True))))
        beams = [([*s.parent, s.token], s.score) for s in state.advance(reports)]
    return [(score, [*s.parent, s.token]) for score, s in state.answers]


CUTS = [{}, {"chunk": 16}, {"tokens": 96}, {"tokens": 96, "chunk": 16, "enable_prefix_caching": False}, {"max_num_seqs": 3}, {"max_num_rows": 4}]


@pytest.mark.parametrize("groups", ["full", "full and window", "pages and slots"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_an_engine_finds_the_same_whatever_becomes_of_its_pages(recall, groups, cut) -> None:
    eos = (3, 50)
    engine = recall.engine(groups, eos=eos, **cut)
    prompts = recall.prompts(9, longest=40)
    kinds = [
        {"beam_width": 4, "n": 2},
        {"beam_width": 3, "length_penalty": 0.3, "early_stopping": True, "stop_token_ids": [9, 17]},
        {"beam_width": 5, "ignore_eos": True, "n": 5, "temperature": 0},
        None,
    ]
    params = {i: SamplingParams(max_tokens=12, **k) if (k := kinds[i % 4]) else SamplingParams(temperature=0, max_tokens=18) for i in range(9)}
    deltas = recall.run(engine, recall.requests(prompts, params))
    for i, prompt in enumerate(prompts):
        if params[i].beam_width is None:
            said = [t for d in deltas[f"r{i}", 0] for t in d.token_ids]
            plain = recall.greedy(engine, prompt, 18)
            assert said == plain[: len(said)]
            continue
        stops = frozenset(params[i].stop_token_ids) | (frozenset() if params[i].ignore_eos else frozenset(eos))
        wanted = search(engine.executor, prompt, params[i], stops)[: params[i].n]
        answers = [deltas[f"r{i}", j] for j in range(params[i].n)]
        assert [a.token_ids for [a] in answers] == [tokens for _, tokens in wanted]
        assert [a.score for [a] in answers] == pytest.approx([score for score, _ in wanted], abs=1e-5)
        for [a] in answers:
            assert a.finish_reason == ("stop" if a.token_ids[-1] in stops else "length")
            assert a.stop_reason == (a.token_ids[-1] if a.token_ids[-1] in params[i].stop_token_ids else None)
            assert (a.usage.prompt_tokens, a.usage.output_tokens) == (len(prompt), len(a.token_ids))
    stats = engine.stats()
    assert (stats.preemptions > 0) == ("max_num_seqs" in cut or "tokens" in cut)
    assert all(used == 0 for used, _ in stats.pages.values())
    assert (stats.running, stats.waiting, stats.prompt_tokens) == (0, 0, sum(map(len, prompts)))
    assert not engine.has_work


def test_log_probabilities_of_beams_are_the_models(recall) -> None:
    engine = recall.engine()
    prompt = recall.prompts(1)[0]
    deltas = recall.run(engine, [Request("r", prompt, SamplingParams(beam_width=3, n=3, max_tokens=6, logprobs=2))])
    for j in range(3):
        [answer] = deltas["r", j]
        tokens = list(prompt)
        for entry, token in zip(answer.logprobs, answer.token_ids, strict=True):
            logprobs = torch.from_numpy(engine.executor.logits(tokens)).log_softmax(-1)
            assert (entry.token_id, entry.logprob) == (token, pytest.approx(logprobs[token].item(), abs=1e-5))
            assert [t for t, _ in entry.top] == logprobs.topk(2).indices.tolist()
            tokens.append(token)
        assert answer.score == pytest.approx(sum(e.logprob for e in answer.logprobs) / 6, abs=1e-5)


def test_an_abort_ends_all_beams(recall) -> None:
    engine = recall.engine(tokens=160)
    prompts = recall.prompts(3)
    for request in recall.requests(prompts, {0: SamplingParams(beam_width=4, n=2, max_tokens=30), 1: SamplingParams(temperature=0, max_tokens=9),
                                             2: SamplingParams(beam_width=3, max_tokens=5)}):  # fmt: skip
        engine.add(request)
    deltas = [d for _ in range(4) for d in engine.step()]
    engine.abort("r0")
    engine.scheduler.check_integrity()
    while engine.has_work:
        deltas += engine.step()
        engine.scheduler.check_integrity()
    assert sorted((d.request_id, d.index, d.finish_reason) for d in deltas if d.finish_reason) == [
        ("r0", 0, "abort"), ("r0", 1, "abort"), ("r1", 0, "length"), ("r2", 0, "length")
    ]  # fmt: skip
    assert [t for d in deltas if d.request_id == "r1" for t in d.token_ids] == recall.greedy(engine, prompts[1], 9)
    assert engine.stats().pages == {"full": (0, 40)}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"beam_width": 2, "n": 3}, "beam_width is 2; it must be at least n, 3"),
        ({"beam_width": 0}, "beam_width is 0; it must be"),
        ({"beam_width": 2, "top_p": 0.5}, "top_p is 0.5; beam search has no use for it"),
        ({"beam_width": 2, "stop": "x"}, "stop is .*; beam search has no use for it"),
        ({"beam_width": 2, "temperature": 0.7}, "temperature is 0.7; beam search compares"),
        ({"beam_width": 98}, "beam_width is 98; the vocabulary has 97"),
        ({"early_stopping": "always"}, "early_stopping is 'always'; it must be"),
    ],
)
def test_searches_that_make_no_sense(recall, params, message) -> None:
    with pytest.raises(RequestError, match=message):
        recall.engine().add(Request("r", [1], SamplingParams(**params)))
