"""Compiles in forked children, which a test can kill, limit or deprive of rights: `python compile_server.py MODEL < requests`.

A request is a line "HOME MODE" and is answered by lines "PID WORD": "started", and at the end "compiled KEY" or "refused: …" or, of a bug,
"raised: …". Modes: "plain"; "limit": no file may grow beyond LIMIT bytes; "nobody": another user, if this one is root.
Everything is imported before the first fork, so that a child begins at once.
"""

from __future__ import annotations

import os
import resource
import signal
import sys

import torch

from ingot.compiler.build import CompileOptions, compile_model
from ingot.models import source
from ingot.models.frontend import trace
from ingot.ops.errors import IngotError

LIMIT = 100_000
NOBODY = 65534


def _compile(model: str, home: str, mode: str) -> str:
    os.environ["INGOT_HOME"] = home
    if mode == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    if mode == "nobody" and os.geteuid() == 0:
        os.setgroups([])
        os.setuid(NOBODY)
    options = CompileOptions(target="x86-64-v3", dtype="float32", max_num_seqs=1, max_num_batched_tokens=1)
    try:
        return f"compiled {compile_model(model, options).key}"
    except IngotError as error:
        return "refused: " + " ".join(str(error).split())


def _say(word: str) -> None:
    os.write(1, f"{os.getpid()} {word}\n".encode())


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a killed child is gone at once
    torch.set_num_threads(1)
    trace(source.resolve(sys.argv[1]).config, dtype=torch.float32)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _say("started")
            try:
                _say(_compile(sys.argv[1], *line.split()))
            except BaseException as error:
                _say(f"raised: {type(error).__name__}: {error}")
                raise
            finally:
                os._exit(0)
