"""What is done once instead of for every token, and what several API processes share: nothing of it can be seen in the answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.runtime.request import Delta, Request, SamplingParams, TokenLogprob, Usage
from ingot.serve.api.job import HOLE, TextEvents
from ingot.serve.client import EngineClient
from ingot.serve.connection import ClientGone, Clients, Connection
from ingot.serve.messages import Abort, Add, Rejected, frame
from ingot.serve.metrics import Metrics
from ingot.serve.protocol.chat import ChatChunk, ChatDelta, ChatMessage
from ingot.serve.protocol.completion import Choice, Completion


@given(st.text(), st.text(max_size=20))
def test_an_event_made_once_is_the_event(text: str, model: str) -> None:
    def completion(t: str) -> Completion:
        return Completion(id="cmpl-1", created=5, model=model, choices=[Choice(index=3, text=t)])

    def chunk(t: str) -> ChatChunk:
        return ChatChunk(id="c", created=5, model=model, choices=[ChatDelta(index=0, delta=ChatMessage(content=t))])

    for event in (completion, chunk):
        assert TextEvents(event(HOLE)).event(text) == b"data: " + event(text).model_dump_json().encode() + b"\n\n"


def test_a_reader_that_is_behind_gets_what_came_as_one_delta_a_choice() -> None:
    async def read() -> tuple[list[tuple[int, Delta]], list[tuple[int, Delta]]]:
        ours, theirs = socket.socketpair()
        client = await EngineClient.connect(ours, Metrics(), "7")
        async with client.generate([[1], [2]], SamplingParams(n=2, max_tokens=9)) as generation:
            first, second = generation._ids
            assert (first, second) == ("7-0", "7-1")
            scores = [TokenLogprob(t, -float(t)) for t in range(9)]
            for delta in (
                Delta(first, 1, [3], "a", [scores[3]], [None, scores[1]], usage=Usage(1, 0, 1)),
                Delta(second, 0, [5], "x"),
                Delta(first, 1, [4], "", [scores[4]]),
                Delta(first, 1, [6], "é", [scores[6]], None, "stop", "é", Usage(1, 0, 3)),
            ):
                client._deliver(delta, 0.0)
            together = await generation.arrived()
            client._deliver(Delta(second, 0, [8], "y"), 0.0)
            alone = await generation.arrived()
        client.close()
        theirs.close()
        return together, alone

    together, alone = asyncio.run(read())
    scores = [TokenLogprob(t, -float(t)) for t in (3, 4, 6)]
    joined = Delta("7-0", 1, [3, 4, 6], "aé", scores, [None, TokenLogprob(1, -1.0)], "stop", "é", Usage(1, 0, 3))
    assert together == [(1, joined), (2, Delta("7-1", 0, [5], "x"))]
    assert alone == [(2, Delta("7-1", 0, [8], "y"))]


@pytest.fixture
def sockets() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    pairs = [socket.socketpair() for _ in range(3)]
    yield pairs
    for pair in pairs:
        for end in pair:
            end.close()


def test_what_a_process_asked_for_is_aborted_when_it_goes(sockets: list[tuple[socket.socket, socket.socket]]) -> None:
    clients = Clients([Connection(engine) for engine, _ in sockets])
    for i, (_, server) in enumerate(sockets):
        server.sendall(frame(Add(Request(f"{i}-0", [1]))))
    arrived = [c for _ in range(3) for c in clients.receive(wait=False)]
    assert {c.request.id for c in arrived if isinstance(c, Add)} == {"0-0", "1-0", "2-0"}
    sockets[1][1].close()
    assert clients.receive(wait=True) == [Abort(["1-0"])]
    assert clients.receive(wait=False) == []
    assert len(clients.everybody()) == 2
    clients.send(clients.forget("1-0"), Rejected("1-0", "nobody hears it"))
    clients.send(clients.forget("2-0"), Rejected("2-0", "heard"))
    assert b"heard" in sockets[2][1].recv(1000)
    sockets[0][1].close()
    with pytest.raises(ClientGone):
        clients.receive(wait=True)
