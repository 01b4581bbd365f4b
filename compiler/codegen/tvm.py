"""TVMScript → shared objects, in worker processes that stay: TVM takes seconds to import, and its defects are segfaults."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ingot.ops.errors import IngotError
from ingot.ops.kernel import Source
from ingot.ops.target import Target, TargetError

_LAUNCHER = Path(__file__).with_name("tvm_parallel.c")
_WORKER = Path(__file__).with_name("tvm_worker.py")
_KERNELS_PER_WORKER = 8  # fewer are not worth another import of TVM


class CodegenError(IngotError):
    """A kernel's source did not compile; the message names the kernel, its source and what the compiler said."""


def llvm_target(target: Target) -> dict[str, Any]:
    """TVM's description of `target`: from its features alone, never from the machine that compiles. TargetError below AVX2."""
    if target.kind != "cpu" or not {"avx2", "fma"} <= target.features:
        raise TargetError(f"TVM kernels need an x86-64 CPU with AVX2 and FMA, and the target is {target}")
    attributes = [f"+{f.replace('avx512_', 'avx512')}" for f in sorted(target.features) if f.startswith("avx512")]
    return {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": "x86-64-v3", "mattr": attributes, "fast-math-contract": True}


@functools.cache
def c_compiler() -> str:
    """The C compiler that links kernels, by name and version. CodegenError when there is none."""
    try:
        return subprocess.run(["cc", "--version"], capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    except FileNotFoundError as error:
        raise CodegenError("compiling for a CPU needs a C compiler to link kernels: install gcc or clang, so that `cc` is on the path") from error


def kernel_name(source: Source, target: Target) -> str:
    """`<family>_<hash>` of all that the shared object depends on."""
    inputs = [source.symbol, source.text, target.isa, importlib.metadata.version("apache-tvm"), _LAUNCHER.read_text(), c_compiler()]
    return f"{source.family}_{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]}"


def compile_sources(
    sources: Sequence[Source], target: Target, out_dir: Path, jobs: int, progress: Callable[[int, int], None] = lambda done, of: None
) -> list[Path]:
    """Compile each source to `out_dir/<name>.so`, its text beside it as `<name>.py`; what is there already is kept.

    At most `jobs` processes work at a time; `progress` gets (done, of). CodegenError for the first kernel that does not compile.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    outputs = [out_dir / f"{kernel_name(s, target)}.so" for s in sources]
    missing = {path: source for path, source in zip(outputs, sources, strict=True) if not path.exists()}
    if not missing:
        return outputs
    for path, source in missing.items():
        path.with_suffix(".py").write_text(source.text)
    count = max(1, min(jobs, len(missing) // _KERNELS_PER_WORKER))
    shares = [list(missing.items())[i::count] for i in range(count)]
    done = itertools.count(1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(count) as pool:
        launcher = Path(folder) / "launcher.o"
        subprocess.run(["cc", "-O2", "-fPIC", "-c", str(_LAUNCHER), "-o", str(launcher)], check=True)
        work = partial(_compile_share, target=json.dumps(llvm_target(target)), launcher=launcher, finished=lambda: progress(next(done), len(missing)))
        # taken here: a worker is killed with the thread that started it
        list(pool.map(work, [_take() for _ in shares], shares))
    return outputs


def _compile_share(worker: _Worker, share: list[tuple[Path, Source]], target: str, launcher: Path, finished: Callable[[], None]) -> None:
    for path, source in share:
        worker.compile(source.symbol, path, launcher, target)
        finished()
    _idle.append(worker)  # one that failed has ended, and does not come here


class _Worker:
    """A process that has imported TVM. It serves all compilations of this process one after another, and ends with it."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the worker)
        self._process = subprocess.Popen([sys.executable, "-P", str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True)

    @property
    def alive(self) -> bool:
        """Whether it waits for work: it may have been killed meanwhile."""
        return self._process.poll() is None

    def compile(self, symbol: str, path: Path, launcher: Path, target: str) -> None:
        """Write `path` from the text beside it. CodegenError, after which the worker is of no use."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{symbol}\t{path.with_suffix('.py')}\t{path}\t{launcher}\t{target}\n")
            process.stdin.flush()
        if process.stdout.readline():
            return
        code = process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        self._stderr.seek(0)
        message = self._stderr.read()[-2000:].strip()
        self._stderr.close()
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        raise CodegenError(f"kernel {path.stem} did not compile (source: {path.with_suffix('.py')}): {how}\n{message}")

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._stderr.close()


def _take() -> _Worker:
    """An idle worker, or a new one."""
    while _idle:
        worker = _idle.pop()
        if worker.alive:
            return worker
        worker.close()
    return _Worker()


_idle: list[_Worker] = []
_parents: list[_Worker] = []


def _leave_to_parent() -> None:
    """In a process that was forked: workers talk to the one that started them."""
    _parents.extend(_idle)
    _idle.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@atexit.register
def _close_idle() -> None:
    while _idle:
        _idle.pop().close()
