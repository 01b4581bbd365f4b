"""Sources → compiled kernels: from the store's cache when they were compiled before, else through the backend's compiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
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
        self._begun: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._begun is not None and not self._begun.done():
            (triton if self.target.kind == "cuda" else tvm).stop()
            wait([self._begun], timeout=0.1)  # it may not have taken its compilers yet
        self._thread.shutdown()

    def begin(self, sources: Iterable[Source]) -> None:
        """Compile these meanwhile; the next call waits for them. What does not compile is told by a call that needs it."""
        self._begun = self._thread.submit(self._compile, self._missing(self._named(sources)), lambda done, of: None)

    def __call__(self, sources: Iterable[Source]) -> dict[Source, tuple[Kernel, Loaded | None]]:
        if self._begun is not None:
            wait([self._begun])
        named = self._named(sources)
        with writing(self.folder):
            self._compile(self._missing(named), self.progress)
        kernels: dict[str, tuple[Kernel, Loaded | None]] = {}
        for source, name in named.items():
            if name not in kernels:
                kernels[name] = self._finish(source, name)
        return {source: kernels[name] for source, name in named.items()}

    def files(self, name: str) -> tuple[bytes, str]:
        """A kernel's binary and the text that it was compiled from."""
        return self._binaries[name], self._texts[name]

    def _named(self, sources: Iterable[Source]) -> dict[Source, str]:
        kernel_name = triton.kernel_name if self.target.kind == "cuda" else tvm.kernel_name
        return {source: kernel_name(source, self.target) for source in sources}

    def _missing(self, named: dict[Source, str]) -> dict[str, Source]:
        """Those that have to be compiled; the others are taken from the store."""
        missing: dict[str, Source] = {}
        for source, name in named.items():
            cached = self.store.kernel(name)
            if cached is None:
                missing[name] = source
            else:
                self._binaries[name], self._texts[name] = cached
        return missing

    def _compile(self, missing: dict[str, Source], progress: Callable[[int, int], None]) -> None:
        self.compiled += len(missing)
        jobs = settings().num_threads
        launches: dict[str, dict[str, object]] = {}
        if self.target.kind == "cuda" and missing:
            for c in triton.compile_sources(list(missing.values()), self.target, jobs, progress):
                self._binaries[c.name] = c.binary
                launches[c.name] = {"symbol": c.symbol, "num_warps": c.num_warps, "shared_bytes": c.shared_bytes, "launch_pdl": c.launch_pdl}
        elif missing:
            for path in tvm.compile_sources(list(missing.values()), self.target, self.folder, jobs):
                self._binaries[path.stem] = path.read_bytes()
        for name, source in missing.items():
            facts = {"symbol": source.symbol} | launches.get(name, {})
            details = {"signature": source.signature, "constants": {k: repr(v) for k, v in source.constants.items()}} if source.signature else {}
            self._texts[name] = f"{_HEADER}{json.dumps(facts | details)}\n{source.text}"
            self.store.keep_kernel(name, *self.files(name))

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
        return {source: loaded for source, (_, loaded) in emitter(sources).items() if loaded is not None}
