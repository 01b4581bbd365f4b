"""A request that is answered, in pieces or as a whole: what completions and chats have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

import msgspec
import pydantic

from ingot.runtime.request import Delta

from ..client import Generation
from ..protocol.usage import Usage
from .tally import Tally

HOLE = "\0hole"
DONE = b"data: [DONE]\n\n"
_HOLE_JSON = msgspec.json.encode(HOLE)


class Piece(Protocol):
    """What a delta adds to a choice."""

    index: int

    def extend(self, piece: Self, /) -> None:
        """Take in the next piece of the same choice."""


P = TypeVar("P", bound=Piece)


class Job(ABC, Generic[P]):
    """One request. `with_usage`: a stream ends with the usage. `text_only`: after a choice's first piece, the next ones are text until its end."""

    def __init__(self, generation: Generation, tally: Tally, *, with_usage: bool, text_only: bool) -> None:
        self.generation = generation
        self._tally, self._with_usage, self._text_only = tally, with_usage, text_only
        self._plain: dict[int, TextEvents] = {}

    @abstractmethod
    def piece(self, choice: int, delta: Delta) -> P | None:
        """None when there is nothing to show: characters are not complete yet. ApiError when the engine gave up."""

    @abstractmethod
    def text_piece(self, choice: int, text: str) -> P:
        """One that is text alone, and not the first of its choice."""

    @abstractmethod
    def chunk(self, pieces: list[P], usage: Usage | None = None) -> pydantic.BaseModel:
        """An event of the stream."""

    def events(self, arrived: Sequence[tuple[int, Delta]]) -> bytes:
        """As server-sent events."""
        said = []
        for choice, delta in arrived:
            plain = self._plain.get(choice)
            if plain is not None and delta.finish_reason is None:  # as a rule
                self._tally.add(choice, delta)
                if delta.text:
                    said.append(plain.event(delta.text))
            elif (piece := self._piece(choice, delta)) is not None:
                said.append(event(self.chunk([piece])))
                if self._text_only:
                    self._plain[choice] = TextEvents(self.chunk([self.text_piece(choice, HOLE)]))
        return b"".join(said)

    def last_events(self) -> bytes:
        """When every choice has ended."""
        usage = event(self.chunk([], self._tally.usage())) if self._with_usage else b""
        return usage + DONE

    async def choices(self) -> list[P]:
        """The whole answer: the pieces of each choice put together, in order."""
        choices: dict[int, P] = {}
        async with self.generation as generation:
            while arrived := await generation.arrived():
                for choice, delta in arrived:
                    piece = self._piece(choice, delta)
                    if piece is not None and choice in choices:
                        choices[choice].extend(piece)
                    elif piece is not None:
                        choices[choice] = piece
        return [choices[i] for i in sorted(choices)]

    def _piece(self, choice: int, delta: Delta) -> P | None:
        self._tally.add(choice, delta)
        return self.piece(choice, delta)


class TextEvents:
    """Events that differ in one string: the JSON around it is made once."""

    def __init__(self, chunk: pydantic.BaseModel) -> None:
        """`chunk`: one of them, its string `HOLE`."""
        self._before, _, self._after = event(chunk).partition(_HOLE_JSON)

    def event(self, text: str) -> bytes:
        return self._before + msgspec.json.encode(text) + self._after


def event(chunk: pydantic.BaseModel | dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + (msgspec.json.encode(chunk) if isinstance(chunk, dict) else chunk.model_dump_json().encode()) + b"\n\n"
