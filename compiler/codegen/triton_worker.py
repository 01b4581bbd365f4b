"""Compiles Triton sources: `python -m ingot.compiler.codegen.triton_worker`, which reads requests and answers until its input ends.

A request is a line `COUNT JOBS` and COUNT lines of JSON, `[source, target]`; an answer is COUNT lines of JSON, a `Compiled` each, in the
order in which they are done. A program of its own, because workers that are forked from the compiling process inherit torch's
threads and locks, and workers that are spawned import that process's main module again, which may be a script that compiles.
Here one process imports Triton, and JOBS are forked from it while it has no threads.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import msgspec
import triton.compiler.code_generator  # noqa: F401  (before the fork, once)
from triton.runtime.cache import triton_key

from ingot.ops.source import Source
from ingot.ops.target import Target

from .triton import TritonCompileError, compile_source, kernel_name

FAILED = 3
"""The exit code when a source does not compile; standard error has the message alone."""


_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """A compiler that is killed leaves nobody at work."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    _die_with_parent()
    triton_key()  # hashes all of Triton, once: the first kernel of every process would
    for line in sys.stdin.buffer:
        count, jobs = map(int, line.split())
        requests = [msgspec.json.decode(sys.stdin.buffer.readline(), type=tuple[Source, Target]) for _ in range(count)]
        if status := compile_all(requests, jobs):
            return status
    return 0


def compile_all(requests: list[tuple[Source, Target]], jobs: int) -> int:
    """Answer the requests; 0, or the exit code of a failure."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork"), initializer=_die_with_parent) as pool:
        waiting = {pool.submit(compile_source, *request): request for request in requests}
        try:
            for future in as_completed(waiting):
                compiled = future.result()
                del waiting[future]
                sys.stdout.buffer.write(msgspec.json.encode(compiled) + b"\n")
                sys.stdout.flush()
        except BrokenProcessPool:
            left = sorted(kernel_name(*request) for request in waiting.values())
            print(f"a compiler process died on one of {', '.join(left)}; compile with INGOT_NUM_THREADS=1 to see which", file=sys.stderr)
            return FAILED
        except TritonCompileError as error:
            pool.shutdown(cancel_futures=True)
            print(error, file=sys.stderr)
            return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
