"""The HTTP server beside an engine's process: loading, ready, draining."""

from __future__ import annotations

import asyncio
import gc
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from .api.app import build_app
from .api.exchange import sending_directly
from .client import EngineClient
from .launch import CLOSE_SECONDS, ServerConfig
from .metrics import Metrics
from .process import age
from .progress import StageBar
from .service import Service

LOST_SECONDS = 2.0
"""How long a server without an engine still answers 503, for load balancers to see, before it exits."""


def serve_until_stopped(config: ServerConfig, listener: socket.socket, sock: socket.socket, workers: Sequence[subprocess.Popen[bytes]] = ()) -> int:
    """Answer on `listener` what the engine at the other end of `sock` says, `workers` doing the same; see `launch.run`."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, listener, sock, workers))


def serve_beside(config: ServerConfig, index: int, listener: socket.socket, sock: socket.socket) -> int:
    """The same in worker `index`, which says on stdout when it is ready."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve_beside(config, index, listener, sock))


async def _serve(config: ServerConfig, listener: socket.socket, sock: socket.socket, workers: Sequence[subprocess.Popen[bytes]]) -> int:
    metrics = Metrics()
    client = await EngineClient.connect(sock, metrics, "0")
    service = Service.open(Path(config.engine.artifact), client, metrics, config.api_key)
    server = _Server(service, config.drain_seconds, workers)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    exits = [asyncio.create_task(asyncio.to_thread(w.wait)) for w in workers]
    try:
        await _load(client, service, serving)
        await asyncio.gather(*(asyncio.to_thread(w.stdout.readline) for w in workers if w.stdout is not None))
        if client.ready.done():
            seconds = age()
            metrics.ready_seconds.set(seconds)
            for stage, spent in client.ready.result().stages.items():
                metrics.start_seconds.labels(stage).set(spent)
            gc.freeze()  # what was imported stays: no collection between two tokens need look at it
            print(f"ready: {_url(listener)} serves {service.model.name} after {seconds:.1f} s", flush=True)
        ends: list[asyncio.Future[Any]] = [serving, *exits]
        await asyncio.wait((client.lost, *ends), return_when=asyncio.FIRST_COMPLETED)
        if server.draining and not client.lost.done():
            await asyncio.wait(ends)
            return 0
        print(f"ingot: {client.lost.result() if client.lost.done() else 'an API process ended unexpectedly'}", file=sys.stderr, flush=True)
        await asyncio.wait((serving,), timeout=LOST_SECONDS)
        return 1
    finally:
        server.should_exit = True
        await serving
        for worker in workers:
            worker.kill()
        client.close()


async def _serve_beside(config: ServerConfig, index: int, listener: socket.socket, sock: socket.socket) -> int:
    metrics = Metrics()
    client = await EngineClient.connect(sock, metrics, str(index))
    service = Service.open(Path(config.engine.artifact), client, metrics, config.api_key)
    server = _Server(service, config.drain_seconds)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait((client.ready, serving), return_when=asyncio.FIRST_COMPLETED)
    gc.freeze()
    print("ready", flush=True)
    await asyncio.wait((client.lost, serving), return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        await asyncio.wait((serving,), timeout=LOST_SECONDS)
    server.should_exit = True
    await serving
    client.close()
    return 0


async def _load(client: EngineClient, service: Service, serving: asyncio.Task[None]) -> None:
    """Wait for the engine to be ready, or for the server to be told to stop. Raises EngineLost."""
    with StageBar(f"loading {service.model.name}") as bar:
        while not client.ready.done() and not serving.done():
            bar.update(client.loading.stage, client.loading.fraction)
            await asyncio.wait((client.ready, serving), timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
    if client.ready.done():
        client.ready.result()


class _Server(uvicorn.Server):
    """uvicorn, except that a signal drains first, and is passed on to `workers`."""

    def __init__(self, service: Service, drain_seconds: float, workers: Sequence[subprocess.Popen[bytes]] = ()) -> None:
        config = uvicorn.Config(
            sending_directly(build_app(service)),
            http="httptools",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        super().__init__(config)
        self._service = service
        self._drain_seconds = drain_seconds
        self._loop = asyncio.get_running_loop()
        self._workers = workers
        self._draining: asyncio.Task[None] | None = None

    @property
    def draining(self) -> bool:
        return self._draining is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._on_signal)

    def _on_signal(self) -> None:
        for worker in self._workers:
            worker.terminate()
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        self._service.draining = True
        try:
            async with asyncio.timeout(self._drain_seconds):
                while self._service.client.num_running:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            self.config.timeout_graceful_shutdown = 0  # what still runs is cut off
        self.should_exit = True


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
