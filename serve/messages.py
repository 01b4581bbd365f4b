"""What the server and the engine's process say to each other: msgpack in frames of four bytes of length, little-endian, and a body."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ingot.runtime.engine import EngineStats
from ingot.runtime.request import Deltas, Request


class Add(msgspec.Struct, tag=True):
    """Begin a request."""

    request: Request


class Abort(msgspec.Struct, tag=True):
    """Forget requests and free their pages; those that have ended already are ignored."""

    request_ids: list[str]


class Embed(msgspec.Struct, tag=True):
    """Make the embeddings of checked texts. `pooling` is an index into `artifacts.manifest.POOLINGS`."""

    request_id: str
    token_ids: list[list[int]]
    pooling: int


class Embedded(msgspec.Struct, tag=True):
    """The embeddings of a request's texts, not normalized: float32 [texts, dimensions], little-endian."""

    request_id: str
    vectors: bytes


class Loading(msgspec.Struct, tag=True):
    """Progress before `Ready`."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, tag=True):
    """The engine takes requests. `seconds` from the start of its process, and what they were spent on, in order."""

    seconds: float
    stages: dict[str, float]
    max_model_len: int
    vocab_size: int


class Failed(msgspec.Struct, tag=True):
    """The artifact could not be loaded, for a reason that the user can mend; the process ends."""

    message: str


class Rejected(msgspec.Struct, tag=True):
    """A request that the engine did not take."""

    request_id: str
    message: str
    field: str | None = None  # of `SamplingParams`


class Step(msgspec.Struct, tag=True):
    """What one step of the engine produced, and how busy it is."""

    deltas: Deltas
    stats: EngineStats


Command = Add | Abort | Embed
Event = Loading | Ready | Failed | Rejected | Step | Embedded

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode


def frame(message: Command | Event) -> bytes:
    """The bytes to send."""
    body = encode(message)
    return len(body).to_bytes(4, "little") + body


def take_frames(buffer: bytearray) -> Iterator[bytes]:
    """Remove the bodies of the complete frames from the front of `buffer`."""
    start = 0
    while len(buffer) - start >= 4:
        end = start + 4 + int.from_bytes(buffer[start : start + 4], "little")
        if end > len(buffer):
            break
        yield bytes(buffer[start + 4 : end])
        start = end
    del buffer[:start]
