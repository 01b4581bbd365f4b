"""The engine's own process: commands in, one message of deltas a step and client out. Started by `launch.spawn_engine`; ends with its first socket."""

from __future__ import annotations

import importlib
import json
import signal
import socket
import time
from collections import defaultdict

from ingot.ops.errors import IngotError
from ingot.ops.garbage import uncollected
from ingot.runtime.embedder import Embedder
from ingot.runtime.engine import Engine, EngineOptions
from ingot.runtime.request import Deltas, RequestError

from .connection import ClientGone, Clients, Connection
from .embedding_loop import serve_embeddings
from .messages import Abort, Add, Failed, Loading, Ready, Rejected, Step
from .process import Stages, age

STATS_SECONDS = 0.2
"""How often everybody is told how busy the engine is, whatever else there is to tell."""


def serve(engine: Engine, clients: Clients) -> None:
    """Run until ClientGone: take the commands that are there, step, tell."""
    told = 0.0
    while True:
        for command in clients.receive(wait=not engine.has_work):
            match command:
                case Add(request=request):
                    try:
                        engine.add(request)
                    except RequestError as error:
                        clients.send(clients.forget(request.id), Rejected(request.id, str(error), error.field))
                case Abort(request_ids=request_ids):
                    for request_id in request_ids:
                        engine.abort(request_id)
        if engine.has_work:
            deltas, now = engine.step(), time.monotonic()
            everybody = not engine.has_work or now - told > STATS_SECONDS
            told = now if everybody else told
            tell(engine, clients, deltas, everybody)


def tell(engine: Engine, clients: Clients, deltas: Deltas, everybody: bool) -> None:
    """To each client the deltas of its requests, and how busy the engine is; with `everybody` also to those who have none."""
    shares = _divide(deltas, clients)
    for request_id in {d.request_id for d in deltas.others if d.finish_reason is not None}:
        if not engine.has(request_id):
            clients.forget(request_id)
    stats = engine.stats()
    for client in clients.everybody() if everybody else shares:
        clients.send(client, Step(shares[client], stats))


def _divide(deltas: Deltas, clients: Clients) -> defaultdict[Connection, Deltas]:
    """Of each client's requests; clients of none have no share."""
    shares, present = defaultdict(Deltas), clients.everybody()
    if len(present) == 1 and (deltas.request_ids or deltas.others):
        shares[present[0]] = deltas
        return shares
    rows: defaultdict[Connection, list[int]] = defaultdict(list)
    for row, owner in enumerate(map(clients.owners.__getitem__, deltas.request_ids)):
        rows[owner].append(row)
    for client, share in rows.items():
        shares[client] = deltas.take(share)
    for delta in deltas.others:
        shares[clients.owners[delta.request_id]].others.append(delta)
    return shares


def run(fds: list[int], config_json: str, stages: Stages) -> int:
    """Load what `config_json` (an EngineConfig) says, say so on the sockets `fds`, serve; the exit code."""
    # A Ctrl-C or a service manager signals the whole group; the server drains first and then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connections = [Connection(socket.socket(fileno=fd)) for fd in fds]
    clients = Clients(connections)
    config = json.loads(config_json)
    module, _, function = config["factory"].partition(":")
    try:
        with uncollected():
            load = getattr(importlib.import_module(module), function)
            options = EngineOptions(**config["options"])
            engine = load(config["artifact"], options, progress=stages.watching(lambda stage, fraction: connections[0].send(Loading(stage, fraction))))
        stages.enter("ready")
        for client in connections:
            clients.send(client, Ready(age(), stages.seconds, engine.max_model_len, engine.vocab_size))
        (serve_embeddings if isinstance(engine, Embedder) else serve)(engine, clients)
    except IngotError as error:
        for client in connections:
            clients.send(client, Failed(str(error)))
        return 1
    except ClientGone:
        return 0
    return 0
