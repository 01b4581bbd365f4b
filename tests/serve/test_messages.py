"""Frames survive any division of the bytes that carry them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ingot.runtime.engine import EngineStats
from ingot.runtime.request import Delta, Deltas, Request, SamplingParams, TokenLogprob, Usage
from ingot.serve.messages import Abort, Add, Rejected, Step, decode_command, decode_event, frame, take_frames


@given(st.lists(st.text(max_size=300), max_size=8), st.lists(st.integers(1, 400), min_size=1))
def test_messages_come_whole_and_in_order(texts: list[str], sizes: list[int]) -> None:
    sent = b"".join(frame(Rejected("r", text)) for text in texts)
    buffer, received, position, i = bytearray(), [], 0, 0
    while position < len(sent):
        size = sizes[i % len(sizes)]
        buffer += sent[position : position + size]
        position, i = position + size, i + 1
        received += [decode_event(body) for body in take_frames(buffer)]
    assert received == [Rejected("r", text) for text in texts]
    assert buffer == b""


def test_requests_and_deltas_arrive_as_they_were() -> None:
    params = SamplingParams(n=3, max_tokens=None, temperature=0.3, top_k=5, seed=2**64 - 1, stop=("a", "ü"), stop_token_ids=(4,), logprobs=2)
    command = Add(Request("7", [1, 2, 300_000], params))
    delta = Delta("7", 2, [5, 6], "té", [TokenLogprob(5, -0.5, ((5, -0.5), (9, -1.25)))], [None, TokenLogprob(1, -2.0)], "stop", "ü", Usage(3, 1, 4))
    step = Step(Deltas([delta], ["8", "9"], [0, 1], [7, 300_000], ["", "ü"]), EngineStats(1, 2, {"full": (3, 4)}, 5, 6, 7, 8, 9, ""))
    assert [decode_command(b) for b in take_frames(bytearray(frame(command) + frame(Abort(["7"]))))] == [command, Abort(["7"])]
    assert [decode_event(b) for b in take_frames(bytearray(frame(step)))] == [step]
