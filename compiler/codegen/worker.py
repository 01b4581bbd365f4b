"""Programs that compile, kept between compilations: importing a compiler takes seconds, and its defects end its process.

A worker is told lines on its standard input and answers in lines on its standard output. It ends with the thread that started it,
when its input is closed, or by a failure.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable


class WorkerDied(Exception):
    """`how` it ended ("exit status 3", "killed by signal 11"), and the end of its standard error."""

    def __init__(self, how: str, message: str) -> None:
        super().__init__(how, message)
        self.how, self.message = how, message


class Worker:
    """A process that runs `python ARGUMENTS`."""

    def __init__(self, arguments: Iterable[str]) -> None:
        command = [sys.executable, "-P", *arguments]  # -P: modules in the current folder must not shadow libraries
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the worker)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True)

    @property
    def alive(self) -> bool:
        """Whether it waits for work: it may have been killed meanwhile."""
        return self._process.poll() is None

    def send(self, *lines: str) -> None:
        """Ask; that nobody listens any more is told by `receive`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("".join(f"{line}\n" for line in lines))
            self._process.stdin.flush()

    def receive(self) -> str:
        """The next line of its answer. Raises WorkerDied, and then the worker is of no more use."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        code = self._process.wait()
        self._stderr.seek(0)
        message = self._stderr.read()[-4000:].strip()
        self.close()
        raise WorkerDied(f"killed by signal {-code}" if code < 0 else f"exit status {code}", message)

    def end(self) -> None:
        """End it; who waits for its answer is told."""
        self._process.terminate()

    def close(self) -> None:
        """End it, wherever it is: what it writes appears whole or not at all."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.terminate()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._stderr.close()


class Workers:
    """The workers of one program that this process has."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._idle: list[Worker] = []
        self._busy: list[Worker] = []
        self._parents: list[Worker] = []
        os.register_at_fork(after_in_child=self._leave_to_parent)
        atexit.register(self._close)

    def take(self) -> Worker:
        """One that is idle, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                break
            worker.close()
        else:
            worker = Worker(self._arguments)
        self._busy.append(worker)
        return worker

    def give_back(self, worker: Worker) -> None:
        self._busy.remove(worker)
        self._idle.append(worker)

    def stop(self) -> None:
        """End those that are at work in another thread, which is told that they died."""
        for worker in self._busy:
            worker.end()

    def warm_up(self, count: int = 1) -> None:
        """See to it that so many are importing, or have."""
        for worker in [self.take() for _ in range(count)]:
            self.give_back(worker)

    def _leave_to_parent(self) -> None:
        """In a process that was forked: workers talk to the one that started them."""
        self._parents += [*self._idle, *self._busy]
        self._idle, self._busy = [], []

    def _close(self) -> None:
        while self._idle:
            self._idle.pop().close()
