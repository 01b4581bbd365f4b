"""TVMScript → shared objects, in worker processes that stay: TVM takes seconds to import, and its defects are segfaults."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ingot.ops.errors import IngotError
from ingot.ops.source import Source
from ingot.ops.target import Target, TargetError

from .worker import Worker, WorkerDied, Workers

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
    waiting = iter(missing.items())  # a worker that imports TVM first takes fewer
    done = itertools.count(1)

    def finished() -> None:
        progress(next(done), len(missing))

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(count) as pool:
        launcher = Path(folder) / "launcher.o"
        subprocess.run(["cc", "-O2", "-fPIC", "-c", str(_LAUNCHER), "-o", str(launcher)], check=True)
        work = partial(_compile, waiting=waiting, target=json.dumps(llvm_target(target)), launcher=launcher, finished=finished)
        # taken here: a worker is killed with the thread that started it
        list(pool.map(work, [_workers.take() for _ in range(count)]))
    return outputs


def _compile(worker: Worker, waiting: Iterator[tuple[Path, Source]], target: str, launcher: Path, finished: Callable[[], None]) -> None:
    for path, source in waiting:
        worker.send(f"{source.symbol}\t{path.with_suffix('.py')}\t{path}\t{launcher}\t{target}")
        try:
            worker.receive()
        except WorkerDied as died:
            what = f"kernel {path.stem} did not compile (source: {path.with_suffix('.py')})"
            raise CodegenError(f"{what}: {died.how}\n{died.message}") from died
        finished()
    _workers.give_back(worker)


_workers = Workers(str(_WORKER))
warm_up, stop = _workers.warm_up, _workers.stop
"""Have workers import TVM while there is other work; end those that are at work in another thread."""
