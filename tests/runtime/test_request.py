"""What a request may say."""

import msgspec
import pytest

from ingot.runtime.request import Delta, Request, RequestError, SamplingParams, TokenLogprob, Usage


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 0), ("n", True), ("n", 1.0), ("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
     ("temperature", "1"), ("top_k", -2), ("top_k", 0.5), ("top_p", 0), ("top_p", 1.01), ("min_p", -0.1), ("min_p", 1.1), ("seed", 2**64),
     ("seed", -(2**63) - 1), ("seed", 0.5), ("stop", ("a", "")), ("stop", (3,)), ("stop_token_ids", (-1,)), ("stop_token_ids", ("a",)),
     ("logprobs", -1), ("prompt_logprobs", 1.5), ("repetition_penalty", 0), ("repetition_penalty", float("inf")), ("presence_penalty", 2.1),
     ("frequency_penalty", -2.1), ("logit_bias", {-1: 1}), ("logit_bias", {5: 101}), ("logit_bias", {"5": 1}), ("min_tokens", -1),
     ("bad_words", ("a", " ")), ("allowed_token_ids", ()), ("allowed_token_ids", (-1,)), ("best_of", 0), ("beam_width", 0),
     ("length_penalty", float("nan")), ("early_stopping", 1)],
)  # fmt: skip
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(RequestError, match=f"^{field} is .*; it must be "):
        SamplingParams(**{field: value})


def test_the_ends_of_the_ranges_are_in_them():
    SamplingParams(n=1, max_tokens=1, temperature=0, top_k=-1, top_p=1, min_p=1, seed=2**64 - 1, logprobs=0, prompt_logprobs=0)
    SamplingParams(max_tokens=None, top_k=0, top_p=1e-9, min_p=0, seed=-(2**63))
    SamplingParams(repetition_penalty=1e-3, presence_penalty=-2, frequency_penalty=2, logit_bias={0: -100, 5: 100.0}, min_tokens=16, bad_words=["a"])
    SamplingParams(allowed_token_ids=[0], best_of=2, n=2), SamplingParams(beam_width=3, n=3, length_penalty=-1, early_stopping="never", temperature=0)


@pytest.mark.parametrize(("fields", "wrong"), [({"min_tokens": 17}, "min_tokens"), ({"n": 3, "best_of": 2}, "best_of"), ({"beam_width": 2, "seed": 1}, "seed")])
def test_fields_that_contradict_each_other(fields, wrong):
    with pytest.raises(RequestError) as refused:
        SamplingParams(**fields)
    assert refused.value.field == wrong


def test_stop_takes_a_string_or_several():
    assert SamplingParams(stop="abc").stop == ("abc",)
    assert SamplingParams(stop=["abc", "d"], stop_token_ids=[1, 2]) == SamplingParams(stop=("abc", "d"), stop_token_ids=(1, 2))


def test_requests_and_deltas_cross_processes():
    request = Request("r", [1, 2], SamplingParams(stop=["x"], seed=5, top_p=0.5), 3, 1.5, ("adapter",))
    delta = Delta("r", 1, [7], "é", [TokenLogprob(7, -0.5, ((7, -0.5), (8, -1.0)))], [None, TokenLogprob(2, -2.0)], "stop", 7, Usage(2, 0, 1), -0.5)
    for message in (request, delta):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message)) == message


def test_errors_of_a_decoded_request_name_the_field():
    data = msgspec.msgpack.encode({"id": "r", "prompt_token_ids": [1], "params": {"temperature": -1.0}})
    with pytest.raises(RequestError, match=r"temperature is -1.0"):
        msgspec.msgpack.decode(data, type=Request)
