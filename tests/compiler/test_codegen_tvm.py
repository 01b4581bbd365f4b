"""TVMScript → shared objects: what they need to run, what a failure says, what a target decides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ingot.artifacts.launch_tvm import load
from ingot.artifacts.plan import Kernel
from ingot.compiler.codegen.tvm import CodegenError, compile_sources, kernel_name, llvm_target
from ingot.ops.kernel import Source
from ingot.ops.target import Target, TargetError

AVX2 = Target("cpu", "x86-64:avx2+fma", "")

THREADS = """
@T.prim_func
def threads(y_: T.handle):
    T.func_attr({"global_symbol": "threads"})
    n = T.int32()
    y = T.match_buffer(y_, (n,), "int32", align=4)
    for i in T.parallel(n):
        y[i] = T.call_extern("int32", "omp_get_thread_num")
"""
HEAP = """
@T.prim_func
def heap(y_: T.handle):
    T.func_attr({"global_symbol": "heap"})
    y = T.match_buffer(y_, (4096,), "float32", align=4)
    t = T.alloc_buffer((4096,), "float32", scope="global")
    for i in T.serial(4096):
        t[i] = y[i]
    for i in T.serial(4096):
        y[i] = t[4095 - i]
"""
# An instruction that the target has not: LLVM aborts the process.
ABORTS = '''
@T.prim_func
def aborts(y_: T.handle):
    T.func_attr({"global_symbol": "aborts"})
    y = T.match_buffer(y_, (16,), "float32", align=4)
    with T.attr(0, "pragma_import_llvm", """
define weak_odr <16 x float> @dot(<16 x float> %a) alwaysinline {
  %b = bitcast <16 x float> %a to <32 x bfloat>
  %c = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %a, <32 x bfloat> %b, <32 x bfloat> %b)
  ret <16 x float> %c
}
"""):
        y[T.ramp(0, 1, 16)] = T.call_extern("float32x16", "dot", y[T.ramp(0, 1, 16)])
'''


def source(symbol: str, text: str) -> Source:
    return Source(symbol, "tvm", symbol, text)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    calls: list[tuple[int, int]] = []
    (path,) = compile_sources([source("threads", THREADS)], AVX2, tmp_path_factory.mktemp("kernels"), 1, lambda done, of: calls.append((done, of)))
    assert calls == [(1, 1)]
    return path


def test_the_text_lies_beside_the_binary_and_a_second_compile_keeps_both(compiled: Path) -> None:
    assert compiled.with_suffix(".py").read_text() == THREADS
    assert sorted(p.suffix for p in compiled.parent.iterdir()) == [".py", ".so"]
    written = compiled.stat().st_mtime_ns
    assert compile_sources([source("threads", THREADS)], AVX2, compiled.parent, 1) == [compiled]
    assert compiled.stat().st_mtime_ns == written


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parallel_loops_use_as_many_threads_as_torch(compiled: Path, count: int) -> None:
    threads = torch.get_num_threads()
    y = torch.full((64,), -1, dtype=torch.int32)
    run = load(Kernel(compiled.stem, "threads", "tvm", "threads", compiled.name, ""), compiled).bind([y])
    torch.set_num_threads(count)
    try:
        run()
    finally:
        torch.set_num_threads(threads)
    assert y.unique().tolist() == list(range(count))


def test_a_kernel_runs_where_tvm_was_never_imported(compiled: Path) -> None:
    program = f"""
import sys
import torch
from pathlib import Path
from ingot.artifacts.launch_tvm import load
from ingot.artifacts.plan import Kernel
y = torch.full((8,), -1, dtype=torch.int32)
load(Kernel("k", "threads", "tvm", "threads", "", ""), Path({str(compiled)!r})).bind([y])()
assert (y >= 0).all()
assert "tvm" not in sys.modules and "triton" not in sys.modules
mapped = {{line.split()[-1] for line in open("/proc/self/maps")}}
assert not any("libtvm_runtime" in path for path in mapped)
assert sum("libgomp" in path for path in mapped) == 1, "two thread pools"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_wrong_arguments_are_refused_by_name(compiled: Path) -> None:
    kernel = load(Kernel(compiled.stem, "threads", "tvm", "threads", compiled.name, ""), compiled)
    with pytest.raises(TypeError, match=r"y\.dtype"):
        kernel.bind([torch.zeros(4)])()


@pytest.mark.parametrize(
    ("symbol", "text", "said"),
    [
        ("heap", HEAP, "at most 1 KB"),
        ("aborts", ABORTS, "killed by signal"),
        ("threads", THREADS.replace("T.parallel(n)", "T.parallel(m)"), "Undefined variable: m"),
    ],
)
def test_a_kernel_that_does_not_compile_is_named_with_its_source(tmp_path: Path, symbol: str, text: str, said: str) -> None:
    with pytest.raises(CodegenError, match=said) as error:
        compile_sources([source(symbol, text)], AVX2, tmp_path, 1)
    name = kernel_name(source(symbol, text), AVX2)
    assert name in str(error.value)
    assert (tmp_path / f"{name}.py").read_text() == text
    assert not (tmp_path / f"{name}.so").exists()


def test_the_target_decides_the_instructions_and_the_name() -> None:
    full = Target("cpu", "x86-64:avx2+fma+avx512f+avx512bw+avx512vl+avx512_vnni+avx512_bf16", "")
    assert llvm_target(AVX2)["mattr"] == []
    assert llvm_target(full)["mattr"] == ["+avx512bf16", "+avx512vnni", "+avx512bw", "+avx512f", "+avx512vl"]
    assert kernel_name(source("threads", THREADS), AVX2) != kernel_name(source("threads", THREADS), full)
    with pytest.raises(TargetError, match="AVX2"):
        llvm_target(Target("cpu", "x86-64:", ""))
