from __future__ import annotations

import random
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ingot.artifacts.artifact import Artifact, ArtifactWriter
from ingot.artifacts.store import Store

SCRIPT = Path(__file__).with_name("builder.py")
ForkServer = runpy.run_path(str(Path(__file__).parents[1] / "fork_server.py"))["ForkServer"]


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


class Builders(ForkServer):
    """Processes that build in a store."""

    def __init__(self) -> None:
        super().__init__(SCRIPT)
        self._unread: list[tuple[int, str]] = []

    def start(self, store: Store, key: str, mode: str = "plain") -> int:
        """The pid of a process that begins to build `key` in `store`."""
        self.ask(store.home, key, mode)
        return self.await_word("started")

    def await_word(self, word: str, pid: int = 0) -> int:
        """Wait until a process (this one, or any) has said a word; its pid."""
        while True:
            for i, (who, said) in enumerate(self._unread):
                if said == word and pid in (0, who):
                    del self._unread[i]
                    return who
            self._unread.append(self.read())

    def words(self, pid: int) -> list[str]:
        """Everything that a process says until its end."""
        while not any(who == pid and said.startswith(("built", "found", "refused")) for who, said in self._unread):
            self._unread.append(self.read())
        return [said for who, said in self._unread if who == pid]


@pytest.fixture(scope="session")
def builders() -> Iterator[Builders]:
    running = Builders()
    yield running
    running.close()
