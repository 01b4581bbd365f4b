from __future__ import annotations

import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ingot.artifacts.artifact import Artifact, ArtifactWriter
from ingot.artifacts.store import Store

SCRIPT = Path(__file__).with_name("builder.py")


@pytest.fixture(scope="session")
def builder() -> SimpleNamespace:
    """The module builder.py."""
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="session")
def artifact(builder: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A finished artifact whose weights are two chunks; who damages a file mends it."""
    folder = tmp_path_factory.mktemp("artifact")
    builder.write(ArtifactWriter(folder), "0123456789abcdef", large=True)
    return Artifact.open(folder)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def build(builder: SimpleNamespace, store: Store) -> Callable[..., Path]:
    """Build an artifact in the store; its folder."""

    def call(key: str, **kwargs: int) -> Path:
        with store.building(key) as writer:
            assert writer is not None
            builder.write(writer, key, **kwargs)
        found = store.find(key)
        assert found is not None
        return found

    return call


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Change one bit of a read-only file."""
    path.chmod(0o644)
    with open(path, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ (1 << bit)]))
    path.chmod(0o444)


@pytest.fixture(name="flip")
def flip_fixture() -> Callable[..., None]:
    return flip


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.nodeid)


class Builders:
    """Processes that build in a store, forked from one that has imported everything."""

    def __init__(self) -> None:
        self._server = subprocess.Popen([sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._unread: list[tuple[int, str]] = []

    def start(self, store: Store, key: str, mode: str = "plain") -> int:
        """The pid of a process that begins to build `key` in `store`."""
        assert self._server.stdin is not None
        self._server.stdin.write(f"{store.home} {key} {mode}\n")
        return self.await_word("started")

    def await_word(self, word: str, pid: int = 0) -> int:
        """Wait until a process (this one, or any) has said a word; its pid."""
        while True:
            for i, (who, said) in enumerate(self._unread):
                if said == word and pid in (0, who):
                    del self._unread[i]
                    return who
            self._read()

    def words(self, pid: int) -> list[str]:
        """Everything that a process says until its end."""
        while not any(who == pid and said.startswith(("built", "found", "refused")) for who, said in self._unread):
            self._read()
        return [said for who, said in self._unread if who == pid]

    def kill(self, pid: int) -> None:
        """kill −9; returns when the process is gone. One that has finished by itself is gone already."""
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.001)

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()

    def _read(self) -> None:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the builders' server died"
        who, said = line.rstrip("\n").split(" ", 1)
        self._unread.append((int(who), said))


@pytest.fixture(scope="session")
def builders() -> Iterator[Builders]:
    running = Builders()
    yield running
    running.close()
