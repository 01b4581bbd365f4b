"""The engine's own process: commands in, one message of deltas a step out. Started by `launch.spawn_engine`; ends with its socket."""

from __future__ import annotations

import importlib
import json
import signal
import socket

from ingot.ops.errors import IngotError
from ingot.runtime.embedder import Embedder
from ingot.runtime.engine import Engine, EngineOptions
from ingot.runtime.request import RequestError

from .connection import Connection, ServerGone
from .embedding_loop import serve_embeddings
from .messages import Abort, Add, Failed, Loading, Ready, Rejected, Step
from .process import Stages, age


def serve(engine: Engine, connection: Connection) -> None:
    """Run until ServerGone: take the commands that are there, step, tell."""
    while True:
        for command in connection.receive(wait=not engine.has_work):
            match command:
                case Add(request=request):
                    try:
                        engine.add(request)
                    except RequestError as error:
                        connection.send(Rejected(request.id, str(error), error.field))
                case Abort(request_ids=request_ids):
                    for request_id in request_ids:
                        engine.abort(request_id)
        if engine.has_work:
            connection.send(Step(engine.step(), engine.stats()))


def run(fd: int, config_json: str, stages: Stages) -> int:
    """Load what `config_json` (an EngineConfig) says, say so on the socket `fd`, serve; the exit code."""
    # A Ctrl-C or a service manager signals the whole group; the server drains first and then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(socket.socket(fileno=fd))
    config = json.loads(config_json)
    module, _, function = config["factory"].partition(":")
    try:
        load = getattr(importlib.import_module(module), function)
        options = EngineOptions(**config["options"])
        engine = load(config["artifact"], options, progress=stages.watching(lambda stage, fraction: connection.send(Loading(stage, fraction))))
        stages.enter("ready")
        connection.send(Ready(age(), stages.seconds, engine.max_model_len, engine.vocab_size))
        (serve_embeddings if isinstance(engine, Embedder) else serve)(engine, connection)
    except IngotError as error:
        connection.send(Failed(str(error)))
        return 1
    except ServerGone:
        return 0
    return 0
