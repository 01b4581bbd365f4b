"""Starting a server: the engine's process first, so that it loads while the server imports; for the same reason this imports little."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import UsageError

_SPIN = {"GOMP_SPINCOUNT": "1000"}
"""A CPU engine's threads share their cores with the server: with libgomp's default they spin in each other's way, ten times slower."""
CLOSE_SECONDS = 5
"""How long connections may take to close when nothing is left to answer, and the engine's process to end."""


@dataclass(frozen=True)
class EngineConfig:
    """What the engine's process loads: `factory` ("module:function") is called with the artifact's path and EngineOptions(**options)."""

    artifact: str
    options: dict[str, Any] = field(default_factory=dict)
    factory: str = "ingot.runtime.load:load_served"


@dataclass(frozen=True)
class ServerConfig:
    """Where to listen and what to serve. `drain_seconds`: how long running requests may take after SIGTERM."""

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    drain_seconds: float = 60.0


def run(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT, which let running requests finish (the second one does not); then 0. 1 when the engine died.

    Raises UsageError when the address cannot be listened on, ArtifactError when the artifact cannot be read, EngineLost when
    the engine cannot load it.
    """
    listener = _listen(config.host, config.port)
    process, sock = spawn_engine(config.engine)
    try:
        from .server import serve_until_stopped

        return serve_until_stopped(config, listener, sock)
    finally:
        sock.close()
        listener.close()
        _reap(process)


def spawn_engine(config: EngineConfig) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the process; it sends `messages.Event`s on the socket and takes `messages.Command`s. It ends when the socket is closed."""
    ours, theirs = socket.socketpair()
    with theirs:
        # -P: modules in the current folder must not shadow libraries.
        command = [sys.executable, "-P", "-m", "ingot.serve.engine_main", str(theirs.fileno()), json.dumps(asdict(config))]
        process = subprocess.Popen(command, env=_SPIN | os.environ, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    return process, ours


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}; choose others with --host and --port (0: a free one)") from error


def _reap(process: subprocess.Popen[bytes]) -> None:
    """The engine ends by itself when its socket closes; one that hangs in a step is killed."""
    try:
        process.wait(timeout=CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
