"""Beam search against transformers', over the same tiny model and without an engine."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ingot.runtime.beam_search import BeamSearch

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
