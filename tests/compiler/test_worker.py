"""Compilers that stay: reused, replaced when they have died, left to the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from ingot.compiler.codegen.worker import WorkerDied, Workers

ECHO = """
import os, sys
for line in sys.stdin:
    if line == "fail\\n":
        sys.exit("it failed")
    print(os.getpid(), line, end="", flush=True)
"""


@pytest.fixture
def workers():
    made = Workers("-c", ECHO)
    yield made
    made._close()


def ask(workers: Workers, line: str) -> list[str]:
    worker = workers.take()
    worker.send(line)
    answer = worker.receive().split()
    workers.give_back(worker)
    return answer


def test_one_that_idles_is_taken_again(workers: Workers) -> None:
    workers.warm_up()
    first, second = ask(workers, "a"), ask(workers, "b")
    assert (first[0], first[1], second[1]) == (second[0], "a", "b")


def test_one_that_was_killed_is_replaced(workers: Workers) -> None:
    pid = ask(workers, "a")[0]
    os.kill(int(pid), signal.SIGKILL)
    os.waitid(os.P_PID, int(pid), os.WEXITED | os.WNOWAIT)
    assert ask(workers, "b")[0] != pid


def test_a_failure_is_told_once_and_the_next_one_is_new(workers: Workers) -> None:
    worker = workers.take()
    worker.send("fail")
    with pytest.raises(WorkerDied) as died:
        worker.receive()
    assert (died.value.how, died.value.message) == ("exit status 1", "it failed")
    assert ask(workers, "a")[1] == "a"


def test_one_at_work_in_another_thread_can_be_stopped(workers: Workers) -> None:
    worker = workers.take()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(worker.receive)  # it was asked nothing, and would wait for ever
        workers.stop()
        with pytest.raises(WorkerDied, match="killed by signal 15"):
            answer.result(30)
    assert ask(workers, "a")[1] == "a"


def test_a_forked_process_has_its_own_and_no_worker_outlives_its_process() -> None:
    program = f"""
import os
from ingot.compiler.codegen.worker import Workers
workers = Workers("-c", {ECHO!r})
def ask():
    worker = workers.take()
    worker.send("x")
    pid = worker.receive().split()[0]
    workers.give_back(worker)
    return pid
mine = ask()
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, ask().encode())
    workers._close()
    os._exit(0)
os.wait()
theirs = os.read(read, 20).decode()
print(mine, ask(), theirs)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    mine, again, theirs = done.stdout.split()
    assert mine == again != theirs
    assert not any(os.path.exists(f"/proc/{pid}") for pid in (mine, theirs))
