"""Starting a server: the engine's process first, so that it loads while the server imports; for the same reason this imports little."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import UsageError

_SPIN = {"GOMP_SPINCOUNT": "1000"}
"""A CPU engine's threads share their cores with the server: with libgomp's default they spin in each other's way, ten times slower."""
SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Where prometheus_client, which reads it when it is imported, keeps the metrics of several processes."""
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
    api_workers: int = 1  # processes that speak HTTP


def run(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT, which let running requests finish (the second one does not); then 0. 1 when the engine or an API process died.

    Raises UsageError when the address cannot be listened on, ArtifactError when the artifact cannot be read, EngineLost when
    the engine cannot load it.
    """
    listeners = _listen(config.host, config.port, config.api_workers)
    with tempfile.TemporaryDirectory(prefix="ingot-metrics-") as shared:
        if config.api_workers > 1:
            os.environ[SHARED_METRICS] = shared
        engine, sockets = spawn_engine(config.engine, config.api_workers)
        workers = [_spawn_worker(config, i, listeners[i], sockets[i]) for i in range(1, config.api_workers)]
        for handed_over in (*listeners[1:], *sockets[1:]):
            handed_over.close()
        try:
            from .server import serve_until_stopped

            return serve_until_stopped(config, listeners[0], sockets[0], workers)
        finally:
            listeners[0].close()
            sockets[0].close()
            for process in (*workers, engine):
                _reap(process)


def spawn_engine(config: EngineConfig, num_clients: int = 1) -> tuple[subprocess.Popen[bytes], list[socket.socket]]:
    """Start the process; on each socket it sends `messages.Event`s and takes `messages.Command`s. It ends when the first one is closed."""
    pairs = [socket.socketpair() for _ in range(num_clients)]
    fds = [theirs.fileno() for _, theirs in pairs]
    # -P: modules in the current folder must not shadow libraries.
    command = [sys.executable, "-P", "-m", "ingot.serve.engine_main", ",".join(map(str, fds)), json.dumps(asdict(config))]
    process = subprocess.Popen(command, env=_SPIN | os.environ, stdin=subprocess.DEVNULL, pass_fds=fds)
    for _, theirs in pairs:
        theirs.close()
    return process, [ours for ours, _ in pairs]


def _spawn_worker(config: ServerConfig, index: int, listener: socket.socket, sock: socket.socket) -> subprocess.Popen[bytes]:
    """One more process that answers; a line on its stdout says that it is ready. In a session of its own: the server passes signals on."""
    fds = [listener.fileno(), sock.fileno()]
    command = [sys.executable, "-P", "-m", "ingot.serve.api_worker", str(index), *map(str, fds), json.dumps(asdict(config))]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=fds, start_new_session=True)


def _listen(host: str, port: int, count: int) -> list[socket.socket]:
    """One socket for each process; between several on one port the kernel divides connections evenly (SO_REUSEPORT)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # the first one alone, so that a port that is taken is an error
        with socket.create_server((host, port), family=family, backlog=2048) as only:
            if count == 1:
                return [only.dup()]
            port = only.getsockname()[1]
        return [socket.create_server((host, port), family=family, backlog=2048, reuse_port=True) for _ in range(count)]
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}; choose others with --host and --port (0: a free one)") from error


def _reap(process: subprocess.Popen[bytes]) -> None:
    """A process ends by itself when its socket closes; one that hangs is killed."""
    try:
        process.wait(timeout=CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
