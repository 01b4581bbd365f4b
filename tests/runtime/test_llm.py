"""`LLM`, over the recalling model and a tokenizer of printable characters."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ingot.runtime import LLM, RequestError, SamplingParams
from ingot.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    characters = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:96], "Ġ"]  # ! … ~ and three more, and the space
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


GREEDY = SamplingParams(temperature=0, max_tokens=12)


def test_prompts_come_back_in_order_as_text_and_ids(recall, tokenizer):
    llm = LLM.over(recall.engine(tokenizer=tokenizer))
    prompts = ["Once upon a time", [5, 6, 7], "x", [1]]
    done = []
    outputs = llm.generate(prompts, GREEDY, progress=lambda finished, total: done.append((finished, total)))
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        said = recall.greedy(llm.engine, ids, 12)
        [completion] = output.outputs
        assert (output.prompt_token_ids, completion.token_ids) == (ids, said)
        assert completion.text == tokenizer.decode(said)
        assert completion.finish_reason == "length"
        assert 0 < output.timing.first_token < output.timing.total
    assert done == [(i, 4) for i in range(1, 5)]
    assert len({o.request_id for o in outputs}) == 4


@pytest.mark.parametrize("prompt", ["one prompt", [7, 8, 9]])
def test_one_prompt_alone(recall, tokenizer, prompt):
    [output] = LLM.over(recall.engine(tokenizer=tokenizer)).generate(prompt, GREEDY)
    assert len(output.outputs[0].token_ids) == 12


def test_each_prompt_has_its_own_parameters(recall, tokenizer):
    llm = LLM.over(recall.engine(tokenizer=tokenizer))
    params = [SamplingParams(temperature=0, max_tokens=3), SamplingParams(n=3, seed=1, max_tokens=5, logprobs=1, prompt_logprobs=0)]
    first, second = llm.generate([[1, 2, 3], [4, 5, 6]], params)
    assert [len(c.token_ids) for c in first.outputs] == [3]
    assert [len(c.token_ids) for c in second.outputs] == [5] * 3
    assert first.prompt_logprobs is None
    assert [None if p is None else p.token_id for p in second.prompt_logprobs] == [None, 5, 6]
    assert all([p.token_id for p in c.logprobs] == c.token_ids for c in second.outputs)
    assert llm.generate([], GREEDY) == []


def test_the_text_ends_before_the_stop_string(recall, tokenizer):
    llm = LLM.over(recall.engine(tokenizer=tokenizer))
    text = llm.generate("Once", GREEDY)[0].outputs[0].text
    stop = text[4:6]
    assert text.find(stop) == 4
    [completion] = llm.generate("Once", SamplingParams(temperature=0, max_tokens=12, stop=["never so", stop]))[0].outputs
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text[:4], "stop", stop)
    assert tokenizer.decode(completion.token_ids) == text[:6]
    # and what looked like one is given out when the length ends it first
    [completion] = llm.generate("Once", SamplingParams(temperature=0, max_tokens=5, stop=[stop]))[0].outputs
    assert (completion.text, completion.finish_reason) == (text[:5], "length")


def test_the_end_of_sequence_token_is_not_text(recall, tokenizer):
    said = recall.greedy(recall.engine(), [9, 8, 7], 6)
    assert said.index(said[3]) == 3
    [completion] = LLM.over(recall.engine(tokenizer=tokenizer, eos=(said[3],))).generate([9, 8, 7], GREEDY)[0].outputs
    assert (completion.token_ids, completion.text) == (said[:4], tokenizer.decode(said[:3]))


def test_when_one_prompt_is_refused_none_is_left_behind(recall):
    llm = LLM.over(recall.engine())
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate([[1, 2], [], [3]], GREEDY)
    assert llm.engine.stats().waiting == 0
    with pytest.raises(RequestError, match="1 for 2 prompts"):
        llm.generate([[1], [2]], [GREEDY])
    with pytest.raises(RequestError, match="the artifact has no tokenizer"):
        llm.generate("text", GREEDY)
    assert llm.generate([1, 2], GREEDY)[0].outputs[0].token_ids == recall.greedy(llm.engine, [1, 2], 12)


def test_an_interrupted_call_frees_what_it_held(recall):
    llm = LLM.over(recall.engine())

    def interrupt(finished, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2], [3, 4]], [SamplingParams(max_tokens=2, temperature=0), GREEDY], progress=interrupt)
    assert llm.engine.stats().pages == {"full": (0, 512)}
    assert llm.generate([1, 2], GREEDY)[0].outputs[0].token_ids == recall.greedy(llm.engine, [1, 2], 12)
