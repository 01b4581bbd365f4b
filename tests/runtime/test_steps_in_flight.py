"""What is special when a step runs while the next one is scheduled: the answers are those of an engine that waits for every step."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.ops.errors import IngotError
from ingot.runtime.request import Request, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def test_a_step_is_launched_before_the_one_before_is_collected(recall_in_flight):
    engine = recall_in_flight.engine()
    engine.add(Request("r", [1, 2, 3], GREEDY))
    launched = []
    while engine.has_work:
        engine.step()
        launched.append(engine.executor.num_steps)
    assert launched == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12]  # and none for what the length limit forbids


@pytest.mark.parametrize("options", [{"overlap": False}, {}])
def test_overlap_can_be_switched_off(recall_in_flight, options):
    engine = recall_in_flight.engine(**options)
    engine.add(Request("r", [1, 2, 3], GREEDY))
    engine.step()
    assert engine.executor.num_steps == (2 if not options else 1)
    recall_in_flight.run(engine, [])


def test_a_stop_is_found_one_step_late_and_the_extra_token_leaves_nothing_behind(recall_in_flight):
    prompt = [1, 2, 3, 4, 5, 6, 8]
    said = recall_in_flight.greedy(recall_in_flight.engine(), prompt, 12)
    assert said.index(said[4]) == 4
    engine = recall_in_flight.engine(eos=(said[4],))
    tokens = recall_in_flight.tokens(engine, [Request("r", prompt, GREEDY)])
    assert tokens == {("r", 0): said[:5]}
    assert engine.executor.num_steps == 6  # five, and one whose token was dropped
    stats = engine.stats()
    assert (stats.generated_tokens, stats.pages["full"][0]) == (5, 0)
    assert len(engine.cache.pools["full"].page_of) == 3  # the extra step computed the last token that was asked for
    longer = [*prompt, *said[:5], 7]
    again = recall_in_flight.tokens(recall_in_flight.engine(), [Request("again", longer, GREEDY)])
    assert recall_in_flight.tokens(engine, [Request("again", longer, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))]) == again


def test_an_abort_in_flight_gives_pages_to_others_at_once(recall_in_flight):
    engine = recall_in_flight.engine(tokens=48)
    prompts = [[i] * length for i, length in enumerate((41, 20, 17))]
    for name, prompt in zip("abc", prompts, strict=True):
        engine.add(Request(name, prompt, SamplingParams(temperature=0, max_tokens=8)))
    engine.step()
    assert engine.stats().pages["full"][0] > 10
    engine.abort("a")
    assert engine.stats().pages["full"][0] == 0
    deltas = recall_in_flight.run(engine, [])
    assert deltas["a", 0][-1].finish_reason == "abort"
    for name, prompt in zip("bc", prompts[1:], strict=True):
        assert [t for d in deltas[name, 0] for t in d.token_ids] == recall_in_flight.greedy(engine, prompt, 8)


@pytest.mark.parametrize("late", [False, True], ids=["launch", "result"])
def test_a_failed_step_ends_its_sequences_and_no_others(recall_in_flight, late):
    engine = recall_in_flight.engine(max_num_seqs=2)
    prompts, steps = recall_in_flight.prompts(6), Counter()

    def fail(batch):
        steps["seen"] += 1
        if steps["seen"] == 3:
            raise IngotError("the device has gone")

    setattr(engine.executor, "fail_late" if late else "fail", fail)
    deltas = recall_in_flight.run(engine, recall_in_flight.requests(prompts, SamplingParams(temperature=0, max_tokens=6)))
    failed = {k for k, v in deltas.items() if v[-1].finish_reason == "error"}
    assert failed == {("r0", 0), ("r1", 0)}
    for i in range(6):
        said = [t for d in deltas[f"r{i}", 0] for t in d.token_ids]
        expected = recall_in_flight.greedy(engine, prompts[i], 6)
        assert said == expected[: len(said)]
        assert len(said) < 6 if i < 2 else len(said) == 6
    assert engine.stats().pages["full"][0] == 0


@pytest.mark.parametrize("look_for_new", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_whatever_happens_the_answers_are_those_of_an_engine_that_waits(recall_in_flight, look_for_new):
    """Arrivals and aborts between steps, stops by token, several continuations, scores, priorities, preemption."""

    @settings(max_examples=600 if look_for_new else 40, deadline=None, derandomize=not look_for_new)
    @given(st.data())
    def check(data):
        same_answers(recall_in_flight, data)

    check()


def same_answers(recall_in_flight, data):
    groups = data.draw(st.sampled_from(["full", "full and window", "windows", "pages and slots"]))
    options = {"tokens": data.draw(st.sampled_from([80, 120, 400])), "chunk": data.draw(st.sampled_from([9, 30, 256])), "max_num_seqs": 5}
    prompts = recall_in_flight.prompts(8, 30, seed=data.draw(st.integers(0, 3)))
    params = [
        SamplingParams(
            temperature=data.draw(st.sampled_from([0.0, 0.9])), seed=i, max_tokens=data.draw(st.integers(1, 12)), n=data.draw(st.integers(1, 2)),
            stop_token_ids=data.draw(st.lists(st.integers(0, 96), max_size=30)), prompt_logprobs=data.draw(st.sampled_from([None, 0])),
            logprobs=data.draw(st.sampled_from([None, 0])),
        )
        for i in range(8)
    ]  # fmt: skip
    arrivals = sorted(data.draw(st.lists(st.integers(0, 12), min_size=8, max_size=8)))
    priorities = data.draw(st.lists(st.integers(0, 1), min_size=8, max_size=8))
    aborts = data.draw(st.dictionaries(st.integers(1, 15), st.integers(0, 7), max_size=2))
    said = {}
    for overlap in (True, False):
        engine = recall_in_flight.engine(groups, overlap=overlap, **options)
        deltas, step = {}, 0
        while engine.has_work or step <= arrivals[-1]:
            for i in range(8):
                if arrivals[i] == step:
                    engine.add(Request(f"r{i}", prompts[i], params[i], priorities[i]))
            if step in aborts:
                engine.abort(f"r{aborts[step]}")
            for d in engine.step():
                deltas.setdefault((d.request_id, d.index), []).append(d)
            engine.scheduler.check_integrity()
            step += 1
        assert all(used == 0 for used, _ in engine.stats().pages.values())
        said[overlap] = {
            k: ([t for d in v for t in d.token_ids], [p.logprob for d in v for p in d.logprobs or ()], v[-1].finish_reason) for k, v in deltas.items()
        }
    assert said[True].keys() == said[False].keys()
    for key, (tokens, logprobs, reason) in said[True].items():
        others, other_logprobs, other_reason = said[False][key]
        length = min(len(tokens), len(others))
        assert tokens[:length] == others[:length]
        assert logprobs[:length] == pytest.approx(other_logprobs[:length], abs=1e-5)
        if "abort" not in (reason, other_reason):
            assert (tokens, reason) == (others, other_reason)
