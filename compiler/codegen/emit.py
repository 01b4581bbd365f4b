"""Sources → compiled kernels: from the store's cache when they were compiled before, else through the backend's compiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import Any, Self

from ingot.artifacts.bound import Loaded, load
from ingot.artifacts.files import writing
from ingot.artifacts.plan import Kernel
from ingot.artifacts.settings import settings
from ingot.artifacts.store import Store
from ingot.ops.kernel import Source
from ingot.ops.target import Target, here

from . import triton, tvm

_HEADER = "# kernel: "
"""First line of a kernel's text in the store: what a launch needs to know, so that a cached binary needs no compiler."""


class Emitter:
    """Compiles what `select` asks for; afterwards `files(name)` gives a kernel's binary and source text.

    `folder` holds the binaries while they are loaded; `progress` gets (done, of). A context: what was begun ends with it.
    """

    def __init__(self, target: Target, store: Store, folder: Path, progress: Callable[[int, int], None]) -> None:
        self.target, self.store, self.folder, self.progress = target, store, folder, progress
        self.compiled = 0
        self.runs_here = target.runs_on(here(target.kind))
        self._binaries: dict[str, bytes] = {}
        self._texts: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(1)
        self._task: Future[None] | None = None  # the last one
        self._changed = Condition()  # when a kernel is there, or a task has ended

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._task is not None and not self._task.done():
            (triton if self.target.kind == "cuda" else tvm).stop()
            wait([self._task], timeout=0.1)  # it may not have taken its compilers yet
        self._thread.shutdown()

    def begin(self, sources: Iterable[Source]) -> None:
        """Compile these meanwhile. What does not compile is told by a call that needs it."""
        self._submit(self._named(sources))

    def __call__(self, sources: Iterable[Source]) -> Iterator[tuple[Source, tuple[Kernel, Loaded | None]]]:
        """Each source with its kernel, as soon as that is there; what was begun comes first."""
        named = self._named(sources)
        waiting: dict[str, list[Source]] = {}
        for source, name in named.items():
            waiting.setdefault(name, []).append(source)
        total, task = len(waiting), self._submit(named)
        while waiting:
            with self._changed:
                while not (there := [name for name in waiting if name in self._texts]) and not task.done():
                    self._changed.wait()
            if not there:
                task.result()  # raises: it has not all
            for name in there:
                kernel = self._finish(waiting[name][0], name)
                yield from ((source, kernel) for source in waiting.pop(name))
                self.progress(total - len(waiting), total)

    def files(self, name: str) -> tuple[bytes, str]:
        """A kernel's binary and the text that it was compiled from."""
        return self._binaries[name], self._texts[name]

    def _named(self, sources: Iterable[Source]) -> dict[Source, str]:
        kernel_name = triton.kernel_name if self.target.kind == "cuda" else tvm.kernel_name
        return {source: kernel_name(source, self.target) for source in sources}

    def _submit(self, named: dict[Source, str]) -> Future[None]:
        self._task = task = self._thread.submit(self._compile, named)
        task.add_done_callback(self._tell)
        return task

    def _tell(self, task: Future[None]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _compile(self, named: dict[Source, str]) -> None:
        """Have all of them: from the store, or compiled."""
        missing: dict[str, Source] = {}
        for source, name in named.items():
            if name not in self._texts and (cached := self.store.kernel(name)) is not None:
                self._keep(name, *cached)
            elif name not in self._texts:
                missing[name] = source
        jobs = settings().num_threads
        with writing(self.folder):
            if self.target.kind == "cuda":
                for c in triton.compile_each(missing.values(), self.target, jobs):
                    self._compiled(missing[c.name], c.name, c.binary, symbol=c.symbol, num_warps=c.num_warps, shared_bytes=c.shared_bytes,
                                   launch_pdl=c.launch_pdl)  # fmt: skip
            elif missing:
                for path in tvm.compile_sources(list(missing.values()), self.target, self.folder, jobs):
                    self._compiled(missing[path.stem], path.stem, path.read_bytes())

    def _compiled(self, source: Source, name: str, binary: bytes, **launch: object) -> None:
        details = {"signature": source.signature, "constants": {k: repr(v) for k, v in source.constants.items()}} if source.signature else {}
        text = f"{_HEADER}{json.dumps({'symbol': source.symbol} | launch | details)}\n{source.text}"
        self.store.keep_kernel(name, binary, text)
        self.compiled += 1
        self._keep(name, binary, text)

    def _keep(self, name: str, binary: bytes, text: str) -> None:
        with self._changed:
            self._binaries[name], self._texts[name] = binary, text
            self._changed.notify_all()

    def _finish(self, source: Source, name: str) -> tuple[Kernel, Loaded | None]:
        suffix = "cubin" if self.target.kind == "cuda" else "so"
        facts, _ = described(self._texts[name])
        launch = {k: facts[k] for k in ("symbol", "num_warps", "shared_bytes", "launch_pdl") if k in facts}
        kernel = Kernel(name=name, family=source.family, backend=source.backend, file=f"kernels/{name}.{suffix}", source=f"kernels/{name}.py", **launch)  # type: ignore[arg-type]
        if not self.runs_here:
            return kernel, None
        path = self.folder / f"{name}.{suffix}"
        if not path.exists():
            with writing(path):
                path.write_bytes(self._binaries[name])
        return kernel, load(kernel, path)


def described(text: str) -> tuple[dict[str, Any], str]:
    """Of a kernel's text in the store or in an artifact: what a launch needs to know, and what was compiled."""
    head, _, source = text.partition("\n")
    return json.loads(head.removeprefix(_HEADER)), source


def load_here(sources: Iterable[Source], target: Target) -> dict[Source, Loaded]:
    """Compiled, or from the store's cache, and loaded on this machine, which must have the target."""
    with (
        tempfile.TemporaryDirectory(prefix="ingot-kernels-") as folder,
        Emitter(target, Store(settings().home), Path(folder), lambda done, of: None) as emitter,
    ):
        return {source: loaded for source, (_, loaded) in emitter(sources) if loaded is not None}
