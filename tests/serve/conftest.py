from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import tokenizers

from ingot.artifacts.artifact import ArtifactWriter
from ingot.artifacts.manifest import Embedding, Group, ModelInfo, Options
from ingot.ops.target import host
from ingot.serve.launch import EngineConfig, ServerConfig

HERE = Path(__file__).parent
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
RUN = """import json, sys
from ingot.serve.launch import EngineConfig, ServerConfig, run
config = json.loads(sys.argv[1])
sys.exit(run(ServerConfig(**config | {"engine": EngineConfig(**config["engine"])})))"""


@pytest.fixture(scope="session")
def fake() -> SimpleNamespace:
    """The module fake_engine.py."""
    return SimpleNamespace(**runpy.run_path(str(HERE / "fake_engine.py")))


def _tokenizer() -> bytes:
    """A token a byte, and three special ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    return tokenizer.to_str().encode()


def _write(folder: Path, *, tokenizer: bool, embedding: Embedding | None = None) -> Path:
    writer = ArtifactWriter(folder)
    if tokenizer:
        writer.add_file("tokenizer/tokenizer.json", _tokenizer())
        writer.add_file("tokenizer/tokenizer_config.json", json.dumps({"chat_template": TEMPLATE}).encode())
    writer.finish(
        key="fa" * 32,
        key_inputs={"model": "none"},
        target=host(),
        model=ModelInfo("fake", "FakeForCausalLM", "fake", 263, 300 if embedding is None else 250, (256,), "float32", 12_345_678),
        options=Options("float32", "none", "auto", 64, 256, False, False),
        groups=(Group("full", "page", 4, 4096),),
        states=(),
        report={"nodes": [["traced", 17], ["fuse", 9]], "seconds": {"total": 1.5}},
        entry_point="forward" if embedding is None else "embed",
        embedding=embedding,
    )
    return folder


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for the fake engine: a manifest and a tokenizer, no weights."""
    return _write(tmp_path_factory.mktemp("fake"), tokenizer=True)


@pytest.fixture(scope="session")
def artifact_without_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("bare"), tokenizer=False)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of an encoder, for the fake embedder."""
    return _write(tmp_path_factory.mktemp("encoder"), tokenizer=True, embedding=Embedding(8, "mean", True, 1))


class Server:
    """A server's process, its engine's process beside it."""

    def __init__(self, config: ServerConfig) -> None:
        command = [sys.executable, "-P", "-c", RUN, json.dumps(asdict(config))]
        env = os.environ | {"PYTHONPATH": str(HERE)}
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{config.port}"
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors)
        self._reader.start()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def wait_ready(self) -> None:
        """Read the ready line, and the URL from it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        ready = re.fullmatch(r"ready: (http://127\.0\.0\.1:\d+) serves fake after [\d.]+ s\n", line)
        assert ready, f"{line!r} {self.errors}"
        self.url = ready[1]

    def http(self, **kwargs: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **kwargs)  # type: ignore[arg-type]

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code."""
        code = self.process.wait(timeout=60)
        self._reader.join()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code

    def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()  # the engine ends when its socket does
            self.wait()


@pytest.fixture(scope="session")
def start(artifact: Path) -> Iterator[Callable[..., Server]]:
    """Start servers over the fake engine; `load` names one of its functions."""
    servers: list[Server] = []

    def call(load: str = "load", *, path: Path = artifact, options: dict[str, object] | None = None, wait: bool = True, **config: object) -> Server:
        server = Server(ServerConfig(EngineConfig(str(path), options or {}, f"fake_engine:{load}"), **{"port": 0, **config}))  # type: ignore[arg-type]
        servers.append(server)
        if wait:
            server.wait_ready()
        return server

    yield call
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(start: Callable[..., Server]) -> Server:
    """One that many tests share."""
    return start()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client
