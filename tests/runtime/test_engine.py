"""The engine end to end, over a model that answers wrongly whenever its batch is wrong."""

import math

import numpy as np
import pytest

from ingot.ops.errors import IngotError
from ingot.runtime.request import Request, RequestError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=20)


@pytest.mark.parametrize("groups", ["full", "full and window", "windows", "pages and slots", "slots"])
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
@pytest.mark.parametrize(
    ("tokens", "chunk", "together"), [(2048, 256, False), (2048, 256, True), (2048, 16, True), (88, 256, True), (88, 16, True), (160, 23, True)]
)
def test_greedy_tokens_do_not_depend_on_the_schedule(recall, groups, caching, tokens, chunk, together):
    engine = recall.engine(groups, tokens=tokens, chunk=chunk, enable_prefix_caching=caching)
    prompts = recall.prompts(12)
    found = recall.tokens(engine, recall.requests(prompts, GREEDY), together)
    assert found == {(f"r{i}", 0): recall.greedy(engine, p, 20) for i, p in enumerate(prompts)}
    stats = engine.stats()
    assert (stats.preemptions > 0) == (tokens < 1000 and "full" in engine.cache.groups)
    if groups in ("full", "full and window") and caching and (not together or chunk < 256 or tokens < 1000):
        assert stats.prefix_hit_tokens > 0
    if not caching or "slot" in engine.info.groups:
        assert stats.prefix_hit_tokens == 0
        assert stats.prefix_caching_off
    assert all(used == 0 for used, _ in stats.pages.values())
    assert (stats.running, stats.waiting, stats.generated_tokens, stats.prompt_tokens) == (0, 0, 240, sum(map(len, prompts)))


@pytest.mark.parametrize("groups", ["full and window", "pages and slots"])
def test_seeded_tokens_do_not_depend_on_the_schedule(recall, groups):
    prompts = recall.prompts(15, seed=3)
    kinds = [
        {"temperature": 0.8, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.7},
        {"temperature": 1.0},
        {"temperature": 1.0, "min_p": 0.1, "top_k": 40, "top_p": 0.9},
        {"temperature": 0},
    ]
    params = {i: SamplingParams(seed=i * 7, max_tokens=15, n=1 + i % 3, **kinds[i % 5]) for i in range(15)}
    requests = recall.requests(prompts, params)
    alone = recall.tokens(recall.engine(groups), requests, together=False)
    assert len({tuple(alone[f"r{i}", j]) for i in range(15) for j in range(1 + i % 3)}) > 22  # continuations differ
    for options in [{}, {"chunk": 16}, {"tokens": 96, "max_num_seqs": 7}, {"tokens": 96, "enable_prefix_caching": False}]:
        assert recall.tokens(recall.engine(groups, **options), requests) == alone


def test_continuations_share_the_prompt(recall):
    engine = recall.engine()
    prompt = recall.prompts(1, 60)[0] * 3
    deltas = recall.run(engine, [Request("r", prompt[:57], SamplingParams(n=4, max_tokens=5, seed=1, ignore_eos=True))])
    assert [deltas["r", i][-1].usage.cached_tokens for i in range(4)] == [0, 56, 56, 56]
    assert engine.stats().prompt_tokens == 57
    assert {len(deltas["r", i]) for i in range(4)} == {5}


@pytest.mark.parametrize("options", [{}, {"tokens": 104, "chunk": 16}])
def test_the_best_of_several_are_answered(recall, options):
    prompts = recall.prompts(5)
    draws = {i: SamplingParams(temperature=1.2, seed=i, max_tokens=7, best_of=6, n=2, logprobs=1 if i == 3 else None, prompt_logprobs=0 if i == 4 else None)
             for i in range(5)}  # fmt: skip
    all_of_them = {i: SamplingParams(temperature=1.2, seed=i, max_tokens=7, n=6, logprobs=0) for i in range(5)}
    each = recall.run(recall.engine(), recall.requests(prompts, all_of_them))
    engine = recall.engine(**options)
    found = recall.run(engine, recall.requests(prompts, draws))
    assert set(found) == {(f"r{i}", j) for i in range(5) for j in range(2)}
    for i, prompt in enumerate(prompts):
        scores = {j: sum(d.logprobs[0].logprob for d in each[f"r{i}", j]) for j in range(6)}
        best = sorted(range(6), key=lambda j: -scores[j])[:2]
        for j, source in enumerate(best):
            [answer] = found[f"r{i}", j]
            assert answer.token_ids == [t for d in each[f"r{i}", source] for t in d.token_ids]
            assert answer.score == pytest.approx(scores[source], abs=1e-5)
            assert (answer.finish_reason, answer.usage.output_tokens) == ("length", 7)
            assert (answer.logprobs is None) == (i != 3)
            assert (answer.prompt_logprobs is None) == (i != 4 or j != 0)
        if i == 3:
            assert [p.token_id for p in found["r3", 0][0].logprobs] == found["r3", 0][0].token_ids
        if i == 4:
            assert len(found["r4", 0][0].prompt_logprobs) == len(prompt)
    assert not engine.has_work
    assert all(used == 0 for used, _ in engine.stats().pages.values())


def test_an_abort_of_several_is_answered_at_once(recall):
    engine = recall.engine()
    engine.add(Request("r", [1, 2, 3], SamplingParams(temperature=1.0, best_of=4, n=2, max_tokens=50)))
    assert list(engine.step()) == []
    engine.abort("r")
    deltas = engine.step()
    assert [(d.index, d.finish_reason) for d in deltas] == [(0, "abort"), (1, "abort")]


def test_a_prefix_is_reused_across_requests_unless_its_keys_differ(recall):
    engine = recall.engine()
    prompt = [5, 6, 7] * 9
    for name, keys, cached in [("a", (), 0), ("b", (), 24), ("c", ("adapter",), 0), ("d", ("adapter",), 24)]:
        delta = recall.run(engine, [Request(name, prompt, GREEDY, cache_keys=keys)])[name, 0][-1]
        assert delta.usage.cached_tokens == cached
        assert delta.usage.prompt_tokens == 27
        assert delta.usage.output_tokens == 20


@pytest.mark.parametrize("options", [{}, {"chunk": 16}, {"max_num_rows": 24}, {"tokens": 100}])
def test_logprobs_are_the_models(recall, options):
    engine = recall.engine(**options)
    prompts = recall.prompts(12)
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=6, logprobs=3, prompt_logprobs=2)
    mixed = {i: params if i % 3 else SamplingParams(temperature=0, max_tokens=9) for i in range(12)}
    deltas = recall.run(engine, recall.requests(prompts, mixed))

    def check(entry, tokens, token, top):
        logits = engine.executor.logits(tokens).astype(np.float64)
        logprobs = logits - math.log(np.exp(logits).sum())
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(logprobs[token], abs=1e-5)
        best = np.argsort(-logprobs)[:top]
        assert [t for t, _ in entry.top] == best.tolist()
        assert [p for _, p in entry.top] == pytest.approx(logprobs[best], abs=1e-5)

    for i, prompt in enumerate(prompts):
        parts = deltas[f"r{i}", 0]
        if i % 3 == 0:
            assert all(d.logprobs is None and d.prompt_logprobs is None for d in parts)
            continue
        assert parts[0].prompt_logprobs[0] is None
        assert len(parts[0].prompt_logprobs) == len(prompt)
        for t in range(1, len(prompt)):
            check(parts[0].prompt_logprobs[t], prompt[:t], prompt[t], 2)
        tokens = list(prompt)
        for d in parts:
            check(d.logprobs[0], tokens, d.token_ids[0], 3)
            tokens += d.token_ids
        assert all(d.prompt_logprobs is None for d in parts[1:])


def test_steps_stay_within_their_limits(recall):
    engine = recall.engine(chunk=40, max_num_seqs=6, max_num_rows=9)
    mixed = {i: SamplingParams(max_tokens=8, seed=1, prompt_logprobs=0 if i % 3 == 0 else None) for i in range(15)}
    recall.run(engine, recall.requests(recall.prompts(15), mixed))
    assert engine.executor.largest == (40, 6, 9)


def test_finish_reasons(recall):
    prompt = recall.prompts(1)[0]
    said = recall.greedy(recall.engine(), prompt, 20)
    fifth = said[4]
    assert said.index(fifth) == 4
    ends = {
        "length": (SamplingParams(temperature=0, max_tokens=4), (), 4, "length", None),
        "eos": (GREEDY, (fifth,), 5, "stop", None),
        "ignored": (SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), (fifth,), 20, "length", None),
        "token": (SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[fifth]), (), 5, "stop", fifth),
        "stop before length": (SamplingParams(temperature=0, max_tokens=5, stop_token_ids=[fifth]), (), 5, "stop", fifth),
        "all that fits": (SamplingParams(temperature=0, max_tokens=None), (), 120 - len(prompt), "length", None),
    }
    for name, (params, eos, count, reason, stop_reason) in ends.items():
        deltas = recall.run(recall.engine(eos=eos), [Request(name, prompt, params)])[name, 0]
        assert sum(len(d.token_ids) for d in deltas) == count, name
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (reason, stop_reason)
        assert all(d.finish_reason is None for d in deltas[:-1])


def test_abort_frees_and_disturbs_nobody(recall):
    engine = recall.engine(tokens=160, chunk=24)
    prompts = recall.prompts(9)
    requests = recall.requests(prompts, {i: SamplingParams(temperature=0, max_tokens=20, n=2 if i == 4 else 1) for i in range(9)})
    for request in requests:
        engine.add(request)
    ended = {}
    tokens = {f"r{i}": [] for i in range(9)}
    for step in range(1000):
        if step in (0, 3, 6):
            engine.abort(f"r{[8, 0, 4][step // 3]}")
            engine.abort("unknown")
            engine.scheduler.check_integrity()
        for d in engine.step():
            if d.index == 0:
                tokens[d.request_id] += d.token_ids
            if d.finish_reason:
                assert ended.setdefault((d.request_id, d.index), d.finish_reason) == d.finish_reason
        if not engine.has_work:
            break
    assert {k for k, v in ended.items() if v == "abort"} == {("r8", 0), ("r0", 0), ("r4", 0), ("r4", 1)}
    assert len(ended) == 10
    for i in (1, 2, 3, 5, 6, 7):
        assert tokens[f"r{i}"] == recall.greedy(engine, prompts[i], 20)
    assert engine.stats().pages == {"full": (0, 40)}
    assert engine.stats().waiting == 0


def test_a_failed_step_ends_its_sequences_and_those_that_wait_are_served(recall):
    engine = recall.engine(max_num_seqs=2)
    prompts = recall.prompts(4)

    def fail(batch):
        if engine.executor.num_steps == 0:
            engine.executor.num_steps += 1
            raise IngotError("the device has gone")

    engine.executor.fail = fail
    deltas = recall.run(engine, recall.requests(prompts, {i: SamplingParams(temperature=0, max_tokens=6, n=2 if i == 0 else 1) for i in range(4)}))
    failed = {k for k, v in deltas.items() if v[-1].finish_reason == "error"}
    assert failed == {("r0", 0), ("r1", 0)}  # the other continuation of r0 computes the prompt itself
    assert all(deltas[k][-1].stop_reason == "the device has gone" for k in failed)
    served = [k for k in deltas if k not in failed]
    assert len(served) == 3
    for request_id, index in served:
        assert [t for d in deltas[request_id, index] for t in d.token_ids] == recall.greedy(engine, prompts[int(request_id[1])], 6)


def test_logits_that_are_not_finite_end_their_request_alone(recall):
    engine = recall.engine()
    prompts = recall.prompts(3)
    bad = prompts[1]
    logits = engine.executor._logits
    poisoned = engine.executor._key("full", np.array(bad) + recall.vocab_size * np.arange(len(bad)))
    engine.executor._logits = lambda keys: np.full(recall.vocab_size, np.nan, np.float32) if keys == [poisoned] else logits(keys)
    deltas = recall.run(engine, recall.requests(prompts, SamplingParams(temperature=0, max_tokens=3)))
    assert [(k, v[-1].finish_reason) for k, v in sorted(deltas.items())] == [(("r0", 0), "length"), (("r1", 0), "error"), (("r2", 0), "length")]
    assert "not finite" in deltas["r1", 0][-1].stop_reason


def test_priority_goes_before_arrival(recall):
    engine = recall.engine(max_num_seqs=1)
    for name, priority in [("late", 5), ("later", 5), ("urgent", -1)]:
        engine.add(Request(name, [1, 2, 3], SamplingParams(temperature=0, max_tokens=2), priority))
    order = []
    while engine.has_work:
        order += [d.request_id for d in engine.step() if d.finish_reason]
    assert order == ["urgent", "late", "later"]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([3, 97], {}, "prompt token 97 is not in the vocabulary of 97"),
        ([-1], {}, "prompt token -1"),
        ([1] * 100, {"max_tokens": 21}, "100 prompt tokens and max_tokens 21 make 121, and the model serves 120"),
        ([1] * 60, {"max_tokens": 22}, "60 prompt tokens and max_tokens 22 need room for 81 tokens, and the whole KV cache holds 80"),
        ([1] * 80, {"max_tokens": None}, "80 prompt tokens fill the whole KV cache of 80"),
        ([1], {"logprobs": 98}, "logprobs is 98; the vocabulary has 97 tokens"),
        ([1], {"prompt_logprobs": 98}, "prompt_logprobs is 98"),
        ([1], {"stop": "x"}, "stop strings need a tokenizer"),
    ],
)
def test_requests_that_cannot_be_served(recall, prompt, params, message):
    engine = recall.engine(tokens=80)
    engine.add(Request("good", [1, 2, 3], GREEDY))
    with pytest.raises(RequestError, match=message):
        engine.add(Request("bad", prompt, SamplingParams(**params)))
    with pytest.raises(RequestError, match="the id is in use"):
        engine.add(Request("good", [1], GREEDY))
    assert recall.tokens(engine, []) == {("good", 0): recall.greedy(engine, [1, 2, 3], 20)}


def test_the_largest_request_that_fits_is_served(recall):
    engine = recall.engine(tokens=80)
    prompt = recall.prompts(1, 60)[0][:1] * 60
    assert recall.tokens(engine, [Request("r", prompt, SamplingParams(temperature=0, max_tokens=21))])["r", 0] == recall.greedy(engine, prompt, 21)


def test_a_budget_beyond_the_artifact_is_refused(recall):
    with pytest.raises(RequestError, match="max_num_batched_tokens is 0; the artifact serves steps of 1 to 256 tokens"):
        recall.engine(chunk=0)
