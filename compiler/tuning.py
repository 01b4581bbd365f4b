"""Tuning tables: which candidate was fastest for a call when all of them were measured on a device.

`artifacts/tuned/<device>.json` is one; `ingot tune` writes it. An entry is found by a hash of everything that the measurement
depended on: the call, the steps, every candidate with its sources, and the layer among whose other calls it was chosen (`layer.py`). Where a kernel family has
changed since, its entries are not found any more, and its candidates are measured again, or ranked where the device is not there.

What was chosen in a layer has a second entry, without it: another model's layer may have the same call, of attention for instance.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

import ingot.artifacts
from ingot.ops.errors import IngotError
from ingot.ops.kernel import Call, Candidate, Steps
from ingot.ops.target import Target

SHIPPED = Path(ingot.artifacts.__file__).parent / "tuned"


class TuningError(IngotError):
    """A tuning table cannot be read or written."""


class Tuned(msgspec.Struct, frozen=True):
    """The fastest candidate of a call, its microseconds, and the call's name for people."""

    call: str
    candidate: str
    us: float


class _File(msgspec.Struct):
    device: str
    isa: str
    entries: dict[str, Tuned]


@dataclass
class Table:
    """Of one device. `name`: the file that it came from, "" for none; `digest` is part of the artifact's key. `strict`: what was chosen in another layer
    is not found."""

    name: str = ""
    digest: str = ""
    entries: dict[str, Tuned] = field(default_factory=dict)
    strict: bool = False

    def key(self, measuring: bool) -> str:
        """What the key of an artifact says of how kernels were chosen."""
        return f"{self.name} {self.digest[:16]}" if self.name else "measured" if measuring else "no table"

    def find(self, call: Call, steps: Steps, found: Sequence[Candidate], layer: str = "") -> tuple[Candidate, Tuned] | None:
        """The candidate to take, when these candidates were measured before. TuningError where the table names one that there is not: someone edited it."""
        keys = fingerprints(call, steps, found, layer) if self.entries else ()
        entry = next((self.entries[k] for k in (keys[:1] if self.strict else keys) if k in self.entries), None)
        if entry is None:
            return None
        named = [c for c in found if c.name == entry.candidate]
        if not named:
            known = ", ".join(sorted(c.name for c in found))
            remedy = "take out its line and measure it again with `ingot tune --add`"
            raise TuningError(f"{self.name} wants {entry.candidate!r} for {entry.call}, for which there are {known}; {remedy}")
        return named[0], entry


def table_for(target: Target) -> Table:
    """The table of the target's device; for a target without one, the first of its instruction set. TuningError when it is damaged."""
    if target.device:
        path = SHIPPED / f"{slug(target.device)}.json"
        return _read(path)[1] if path.is_file() else Table()
    for path in sorted(SHIPPED.glob("*.json")):
        file, table = _read(path)
        if file.isa == target.isa:
            return table
    return Table()


def _read(path: Path) -> tuple[_File, Table]:
    try:
        data = path.read_bytes()
        file = msgspec.json.decode(data, type=_File)
    except (OSError, msgspec.DecodeError) as error:
        raise TuningError(f"{path} is not a tuning table: {error}; write it again with `ingot tune`, or delete it") from error
    return file, Table(path.name, hashlib.sha256(data).hexdigest(), file.entries)


def entries_of(path: Path, target: Target) -> dict[str, Tuned]:
    """The entries of a table of the target's device. TuningError when it is damaged or another device's."""
    file, table = _read(path)
    if file.device != target.device:
        raise TuningError(f"{path} is the table of {file.device}, this is {target.device}; give another file with -o")
    return table.entries


def write(path: Path, target: Target, entries: dict[str, Tuned]) -> None:
    """Write the table of the target's device: an entry a line, in the order of calls, so that two tables can be compared. TuningError."""
    ordered = sorted(entries.items(), key=lambda e: (e[1].call, e[0]))
    lines = [f'  "{key}": {msgspec.json.encode(entry).decode()}' for key, entry in ordered]
    text = f'{{"device": {json.dumps(target.device)}, "isa": {json.dumps(target.isa)}, "entries": {{\n' + ",\n".join(lines) + "\n}}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise TuningError(f"cannot write {path}: {error.strerror}; give another file with -o") from error


def slug(device: str) -> str:
    """A file's name: "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def fingerprints(call: Call, steps: Steps, found: Sequence[Candidate], layer: str = "") -> tuple[str, ...]:
    """16 hexadecimal digits of the call, the steps, the candidates, in whatever order they rank, and the layer, if there is one; and the same without it."""
    alone = hashlib.sha256("\n".join([repr(call), repr(steps), *sorted(repr(replace(c, rank=0.0)) for c in found)]).encode())
    if not layer:
        return (alone.hexdigest()[:16],)
    among = alone.copy()
    among.update(layer.encode())
    return among.hexdigest()[:16], alone.hexdigest()[:16]
