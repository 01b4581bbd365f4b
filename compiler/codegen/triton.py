"""Triton sources → cubins, on any machine: no GPU is needed, and what comes out needs no Triton to run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import msgspec

from ingot.ops.errors import IngotError
from ingot.ops.source import Source
from ingot.ops.target import SHARED_MEMORY_BYTES, Target

from .worker import WorkerDied, Workers


class TritonCompileError(IngotError):
    """A generated Triton source does not compile for a target, or needs more than the target has."""


@dataclass(frozen=True)
class Compiled:
    """A cubin and what a launch of it needs. Its parameters are the source's run-time arguments and two null pointers."""

    name: str  # content-addressed: "<family>_<hash>"
    binary: bytes
    symbol: str
    num_warps: int
    shared_bytes: int  # dynamic shared memory of a block
    launch_pdl: bool


def kernel_name(source: Source, target: Target) -> str:
    """`<family>_<hash>` of everything that decides the cubin: the source, the instruction set, Triton's version."""
    facts = [source.symbol, source.text, source.signature, sorted((k, repr(v)) for k, v in source.constants.items()), source.divisible,
             source.num_warps, source.num_stages, target.isa, importlib.metadata.version("triton")]  # fmt: skip
    return f"{source.family}_{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}"


def compile_source(source: Source, target: Target) -> Compiled:
    """Compile `source` for `target` (any CUDA target, present or not), leaving Triton's own cache untouched.

    The same source gives the same bytes: no path and no line of this machine enters the cubin. Raises TritonCompileError.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    name = kernel_name(source, target)
    with tempfile.TemporaryDirectory(prefix="ingot-triton-") as folder, triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.disable_line_info = True
        fn = getattr(_module(source, name, Path(folder)), source.symbol)
        if not isinstance(fn, triton.JITFunction):
            raise TritonCompileError(f"{name}: {source.symbol} is a {type(fn).__name__}, not a compilable function; is TRITON_INTERPRET set?")
        overlaps = "PDL" in fn.arg_names and target.arch >= 90
        constants = source.constants | ({"PDL": overlaps} if "PDL" in fn.arg_names else {})
        unbound = [p for p in fn.arg_names if (p in source.signature) == (p in constants)]
        if unbound:
            raise TritonCompileError(f"{name}: {', '.join(unbound)} must be in exactly one of signature and constants")
        signature = {p: source.signature.get(p, "constexpr") for p in fn.arg_names}
        aligned = [i for i, (p, t) in enumerate(signature.items()) if t.startswith("*") or p in source.divisible]
        ast = (GluonASTSource if fn.is_gluon() else ASTSource)(fn, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
        options = {"num_warps": source.num_warps, "num_stages": source.num_stages, "launch_pdl": overlaps}
        try:
            kernel = triton.compile(ast, target=GPUTarget("cuda", target.arch, 32), options=options)
            binary = kernel.asm["cubin"]
        except (triton.TritonError, RuntimeError) as error:
            raise TritonCompileError(f"{name} ({source.symbol}) does not compile for {target.isa}: {error}") from error
    metadata = kernel.metadata
    if metadata.shared > SHARED_MEMORY_BYTES[target.isa]:
        raise TritonCompileError(
            f"{name} needs {metadata.shared} bytes of shared memory, {target.isa} has {SHARED_MEMORY_BYTES[target.isa]}: use smaller tiles"
        )
    if metadata.global_scratch_size or metadata.num_ctas != 1:
        raise TritonCompileError(f"{name} needs Triton's own scratch memory or clusters, which a plan cannot give it: declare Candidate.scratch instead")
    return Compiled(name, binary, metadata.name, metadata.num_warps, metadata.shared, overlaps)


def compile_each(sources: Iterable[Source], target: Target, jobs: int) -> Iterator[Compiled]:
    """Compile in `jobs` processes (`triton_worker`), equal sources once; each is given out when it is done.

    Raises TritonCompileError, also when a compiler process dies.
    """
    named = {kernel_name(source, target): source for source in sources}
    if not named:
        return
    longest_first = sorted(named.values(), key=lambda s: -len(s.text))  # it takes longest, and should not be the last alone
    worker = _workers.take()
    worker.send(f"{len(named)} {max(1, min(jobs, len(named)))}", *(msgspec.json.encode((source, target)).decode() for source in longest_first))
    try:
        for _ in named:
            yield msgspec.json.decode(worker.receive(), type=Compiled)
    except WorkerDied as died:
        raise TritonCompileError(died.message or f"the process that compiles Triton kernels ended: {died.how}") from died
    _workers.give_back(worker)


def compile_sources(sources: Sequence[Source], target: Target, jobs: int, progress: Callable[[int, int], None] = lambda done, of: None) -> list[Compiled]:
    """What `compile_each` gives, in the order of `sources`. `progress` gets (done, of)."""
    names = [kernel_name(source, target) for source in sources]
    done: dict[str, Compiled] = {}
    for compiled in compile_each(sources, target, jobs):
        done[compiled.name] = compiled
        progress(len(done), len(set(names)))
    return [done[name] for name in names]


_workers = Workers("-m", f"{__package__}.triton_worker")
warm_up, stop = _workers.warm_up, _workers.stop
"""Have the compiling process import Triton while there is other work; end it while it is at work in another thread."""


def _module(source: Source, name: str, folder: Path) -> ModuleType:
    """Triton reads a function's source from its file, so the text becomes one."""
    path = folder / f"{name}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(source.family, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
