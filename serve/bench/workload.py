"""What `ingot bench serve` asks for: prompts and answer lengths from distributions or a file, and when each request is sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ingot.ops.errors import IngotError

WORDS = "the of and to in a is that it for on with as was at by an be this from or which one all there not but had were".split()


class WorkloadError(IngotError):
    """The file of prompts or a length cannot be used."""


@dataclass(frozen=True)
class Lengths:
    """Uniform in `shortest` … `longest`, both included."""

    shortest: int
    longest: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """`128`, or `100:1024`. Raises WorkloadError."""
        first, colon, last = text.partition(":")
        if not first.isdecimal() or (colon and not last.isdecimal()) or not 1 <= int(first) <= int(last or first):
            raise WorkloadError(f"{text!r} is not a number of tokens such as 128, or a range such as 100:1024")
        return cls(int(first), int(last or first))

    def draw(self, random: np.random.Generator, count: int) -> list[int]:
        return random.integers(self.shortest, self.longest, count, endpoint=True).tolist()


@dataclass(frozen=True)
class Call:
    """One request: a prompt (text, or token ids), the most tokens of its answer, and the second at which it is sent."""

    prompt: str | list[int]
    max_tokens: int
    at: float


def random_prompts(random: np.random.Generator, lengths: Sequence[int], vocab_size: int | None) -> list[str | list[int]]:
    """Token ids below `vocab_size`, or as many common words when it is None."""
    if vocab_size is None:
        return [" ".join(random.choice(WORDS, n).tolist()) for n in lengths]
    return [random.integers(0, vocab_size, n).tolist() for n in lengths]


def read_prompts(path: Path, count: int) -> list[str | list[int]]:
    """`count` prompts of a file, again from its start when it has fewer: a line of JSON each, a string or an object with a `prompt`. Raises WorkloadError."""
    prompts: list[str | list[int]] = []
    try:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip():
                value = json.loads(line)
                value = value.get("prompt") if isinstance(value, dict) else value
                if not value or not isinstance(value, (str, list)):
                    raise WorkloadError(f"{path}:{number} is neither a string nor an object with a prompt")
                prompts.append(value)
    except (OSError, json.JSONDecodeError) as error:
        raise WorkloadError(f"{path} cannot be read: {error}; it needs a line of JSON a prompt") from error
    if not prompts:
        raise WorkloadError(f"{path} has no prompts")
    return [prompts[i % len(prompts)] for i in range(count)]


def arrivals(random: np.random.Generator, count: int, rate: float | None) -> list[float]:
    """A Poisson process of `rate` requests a second; None: all at once."""
    return [0.0] * count if rate is None else np.cumsum(random.exponential(1 / rate, count)).tolist()
