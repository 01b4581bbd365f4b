"""Triton sources become cubins on a machine without a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ingot.artifacts.settings import settings
from ingot.artifacts.store import Store
from ingot.compiler.codegen.emit import Emitter
from ingot.compiler.codegen.triton import TritonCompileError, compile_source, compile_sources, kernel_name
from ingot.compiler.codegen.worker import Workers
from ingot.ops.kernel import Source
from ingot.ops.target import GPU_ARCHES, Target

TEXT = """import triton
import triton.language as tl


@triton.jit
def scale_kernel(x, bias, out, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(x + i, mask=i < n) * FACTOR
    if bias is not None:
        h += tl.load(bias + i, mask=i < n)
    tl.store(out + i, h, mask=i < n)
"""
SOURCE = Source("scale", "triton", "scale_kernel", TEXT, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"bias": None, "FACTOR": 3, "BLOCK": 256}, num_warps=2)
SM_90 = Target("cuda", "sm_90", "")


def test_a_cubin_says_what_a_launch_needs():
    compiled = compile_source(SOURCE, SM_90)
    assert compiled.binary[:4] == b"\x7fELF"
    assert (compiled.symbol, compiled.num_warps, compiled.shared_bytes) == ("scale_kernel", 2, 0)
    assert compiled.symbol.encode() in compiled.binary


def test_an_emitter_gives_out_what_is_there_and_can_be_asked_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setenv("INGOT_HOME", str(tmp_path / "home"))
    others, late = [replace(SOURCE, num_warps=n) for n in (4, 8)], replace(SOURCE, num_stages=2)
    progress = []
    with Emitter(SM_90, Store(settings().home), tmp_path, lambda done, of: progress.append((done, of))) as emitter:
        emitter.begin(others)
        seen = []
        for source, (kernel, _) in emitter([SOURCE, *others]):
            seen.append(source)
            assert emitter.files(kernel.name)[0][:4] == b"\x7fELF"
            if len(seen) == 1:  # asked for something else before the rest is there
                assert [s for s, _ in emitter([late, source])] in ([late, source], [source, late])
        assert sorted(map(repr, seen)) == sorted(map(repr, [SOURCE, *others]))
        assert emitter.compiled == 4 and progress[-1] == (3, 3)
        wrong = replace(SOURCE, constants=SOURCE.constants | {"BLOCK": 100})
        emitter.begin([wrong])  # tells nobody
        with pytest.raises(TritonCompileError, match="does not compile"):
            list(emitter([SOURCE, wrong]))
    with Emitter(SM_90, Store(settings().home), tmp_path, lambda done, of: None) as again:
        assert len(list(again([SOURCE, *others, late]))) == 4 and again.compiled == 0


def test_names_follow_whatever_changes_the_cubin():
    changed = [
        replace(SOURCE, text=TEXT + "\n"),
        replace(SOURCE, constants=SOURCE.constants | {"FACTOR": 4}),
        replace(SOURCE, signature=SOURCE.signature | {"x": "*bf16"}),
        replace(SOURCE, num_warps=4),
        replace(SOURCE, num_stages=2),
        replace(SOURCE, divisible=("n",)),
    ]
    names = [kernel_name(s, SM_90) for s in (SOURCE, *changed)] + [kernel_name(SOURCE, Target("cuda", "sm_80", ""))]
    assert len(set(names)) == len(names)
    assert kernel_name(SOURCE, Target("cuda", "sm_90", "NVIDIA H200")) == names[0]
    assert all(n.startswith("scale_") for n in names)


def test_parallel_compilation_keeps_the_order_and_the_bytes():
    sources = [SOURCE, replace(SOURCE, num_warps=4), SOURCE]
    seen = []
    compiled = compile_sources(sources, SM_90, 2, lambda done, of: seen.append((done, of)))
    assert [c.num_warps for c in compiled] == [2, 4, 2]
    assert seen == [(1, 2), (2, 2)]
    here = compile_source(SOURCE, SM_90)
    assert compiled[0] == here
    assert str(Path.cwd()).encode() not in here.binary
    assert b"/tmp" not in here.binary


@pytest.mark.parametrize("isa", GPU_ARCHES)
def test_every_architecture(isa):
    assert compile_source(SOURCE, Target("cuda", isa, "")).binary[:4] == b"\x7fELF"


def test_aligned_pointers_and_divisible_sizes_give_wide_accesses():
    import triton

    def widest(source):
        sass = triton.tools.disasm.get_sass(compile_source(source, SM_90).binary)
        return "LDG.E.128" in sass

    sure = replace(SOURCE, divisible=("n",), constants=SOURCE.constants | {"BLOCK": 1024})
    assert widest(sure)
    assert not widest(replace(sure, divisible=()))


def test_the_cache_of_triton_stays_untouched(tmp_path):
    code = f"from ingot.compiler.codegen.triton import *; from ingot.ops.target import Target; compile_source({SOURCE!r}, Target('cuda', 'sm_90', ''))"
    code = "from ingot.ops.kernel import Source; " + code
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_HOME": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named():
    with pytest.raises(TritonCompileError, match="FACTOR must be in exactly one of"):
        compile_source(replace(SOURCE, constants={"bias": None, "BLOCK": 256}), SM_90)
    with pytest.raises(TritonCompileError, match=r"scale_\w+ \(scale_kernel\) does not compile for sm_90(.|\n)*power of 2"):
        compile_source(replace(SOURCE, constants=SOURCE.constants | {"BLOCK": 100}), SM_90)
    with pytest.raises(TritonCompileError, match="does not compile"):
        compile_sources([SOURCE, replace(SOURCE, constants=SOURCE.constants | {"BLOCK": 100})], SM_90, 1)
    big = """import triton
import triton.language as tl


@triton.jit
def big_kernel(x, out):
    i, k = tl.arange(0, 32), tl.arange(0, 128)
    h = tl.zeros([32, 32], tl.float32)
    for begin in range(0, 4096, 128):
        h = tl.dot(tl.load(x + i[:, None] * 4096 + begin + k[None, :]), tl.load(x + i[None, :] * 4096 + begin + k[:, None]), h)
    tl.store(out + i[:, None] * 32 + i[None, :], h)
"""
    with pytest.raises(TritonCompileError, match="bytes of shared memory, sm_86 has 101376"):
        compile_source(Source("big", "triton", "big_kernel", big, {"x": "*bf16", "out": "*fp32"}, num_stages=8), Target("cuda", "sm_86", ""))


def test_a_script_without_a_main_guard_may_compile(tmp_path):
    """Workers import nothing of the program that compiles: here they would compile again, and wait for one another."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
from ingot.compiler.codegen.triton import compile_sources
from ingot.ops.kernel import Source
from ingot.ops.target import Target
print("imported", flush=True)
print(len(compile_sources([{SOURCE!r}], Target("cuda", "sm_90", ""), 2)))
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["imported", "1"], done.stderr


def test_a_worker_that_dies_is_told(monkeypatch):
    monkeypatch.setattr("ingot.compiler.codegen.triton._workers", Workers("-m", "ingot.nothing"))
    with pytest.raises(TritonCompileError, match="No module named"):
        compile_sources([SOURCE], SM_90, 1)
