"""Processes forked from one that has imported everything, so that each begins at once, and a test can kill it at any moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class ForkServer:
    """A script that forks a child for each line that it reads; children write lines "PID WORD"."""

    def __init__(self, script: Path, *args: object) -> None:
        command = [sys.executable, str(script), *map(str, args)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._killed: set[int] = set()

    def ask(self, *words: object) -> None:
        """Have a child forked."""
        assert self._server.stdin is not None
        self._server.stdin.write(" ".join(map(str, words)) + "\n")

    def read(self) -> tuple[int, str]:
        """Who says something next, and what."""
        assert self._server.stdout is not None
        while line := self._server.stdout.readline():
            pid, word = line.rstrip("\n").split(" ", 1)
            if int(pid) not in self._killed:
                return int(pid), word
        raise AssertionError("the server died")

    def kill(self, pid: int) -> None:
        """kill −9, unless it has finished by itself; returns when the process is gone, and what it said and nobody read is forgotten."""
        self._killed.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.001)

    def close(self) -> None:
        """End it, when its children have ended."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()
