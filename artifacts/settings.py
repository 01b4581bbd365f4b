"""Every environment variable that Ingot reads, in one place.

| variable | meaning | default |
|---|---|---|
| `INGOT_HOME` | the folder of the store: artifacts, kernels, caches | `$XDG_CACHE_HOME/ingot`, else `~/.cache/ingot` |
| `INGOT_DUMP` | a folder that gets the graph after each pass and every generated source | unset: nothing is written |
| `INGOT_NUM_THREADS` | threads for CPU kernels, hashing, copies and compilers | the CPUs that this process may use |
| `INGOT_LOG_LEVEL` | DEBUG, INFO, WARNING or ERROR | INFO |
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from ingot.ops.errors import IngotError

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class SettingsError(IngotError):
    """An environment variable has a value that means nothing."""


class Settings(msgspec.Struct, frozen=True):
    """The environment variables, parsed; the table above says what they mean."""

    home: Path
    dump: Path | None
    num_threads: int
    log_level: str


def settings() -> Settings:
    """Read the environment; SettingsError names the variable and what it may be. An empty variable counts as unset."""
    return Settings(
        home=Path(_read("INGOT_HOME") or Path(_read("XDG_CACHE_HOME") or Path.home() / ".cache") / "ingot").expanduser().absolute(),
        dump=Path(dump).expanduser().absolute() if (dump := _read("INGOT_DUMP")) else None,
        num_threads=_num_threads(),
        log_level=_log_level(),
    )


def _read(name: str) -> str:
    return os.environ.get(name, "").strip()


def _num_threads() -> int:
    text = _read("INGOT_NUM_THREADS")
    if not text:
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or int(text) == 0:
        raise SettingsError(f"INGOT_NUM_THREADS is {text!r}: set it to a positive number of threads, or unset it to use every CPU")
    return int(text)


def _log_level() -> str:
    text = _read("INGOT_LOG_LEVEL") or "INFO"
    if text.upper() not in LOG_LEVELS:
        raise SettingsError(f"INGOT_LOG_LEVEL is {text!r}: set it to one of {', '.join(LOG_LEVELS)}")
    return text.upper()
