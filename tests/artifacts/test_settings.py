from __future__ import annotations

import os
from pathlib import Path

import pytest

from ingot.artifacts import settings as module
from ingot.artifacts.settings import SettingsError, settings


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("INGOT_")] + ["XDG_CACHE_HOME"]:
        monkeypatch.delenv(name, raising=False)


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = settings()
    assert (found.home, found.dump, found.log_level) == (tmp_path / ".cache" / "ingot", None, "INFO")
    assert found.num_threads == len(os.sched_getaffinity(0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert settings().home == tmp_path / "xdg" / "ingot"


def test_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"INGOT_HOME": "store", "INGOT_DUMP": "~/dump", "INGOT_NUM_THREADS": "3", "INGOT_LOG_LEVEL": "debug"}.items():
        monkeypatch.setenv(name, value)
    found = settings()
    assert (found.home, found.dump, found.num_threads, found.log_level) == (tmp_path / "store", Path.home() / "dump", 3, "DEBUG")


@pytest.mark.parametrize(("name", "value"), [("INGOT_NUM_THREADS", v) for v in ("0", "-1", "two", "1.5")] + [("INGOT_LOG_LEVEL", "loud")])
def test_a_meaningless_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=rf"{name} is '{value}': set it to"):
        settings()


def test_every_variable_is_documented() -> None:
    source = Path(module.__file__).read_text()
    code = source.partition("from __future__")[2]
    read = {word.strip('"') for word in code.replace("(", " ").replace(")", " ").split() if word.startswith('"INGOT_')}
    assert len(read) == 4
    assert all(f"`{name}`" in (module.__doc__ or "") for name in read)
