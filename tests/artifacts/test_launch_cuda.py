"""Cubins through the CUDA driver: what is checked before a launch, and on a GPU the launches themselves."""

import itertools
import sys

import pytest
import torch

from ingot.artifacts.launch_cuda import CudaFunction, LaunchError, _driver, load
from ingot.artifacts.plan import Kernel
from ingot.compiler.codegen.triton import compile_source
from ingot.ops.kernel import Source
from ingot.ops.target import gpu

ADD = """import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def add_kernel(x, out, n, amount, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tl.store(out + i, tl.load(x + i, mask=i < n) + amount, mask=i < n)
"""
TRANSPOSE = """import triton
import triton.language as tl


@triton.jit
def transpose_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    h = tl.load(x + i[:, None] * N + i[None, :])
    tl.store(out + i[:, None] * N + i[None, :], tl.trans(h))
"""


def function(driver=None):
    return CudaFunction("add_0", driver, None, None, 128, 0, False, (8, 8, 4, 4))


def test_arguments_must_be_those_of_the_cubin():
    x = torch.randn(8)
    with pytest.raises(LaunchError, match="add_0 takes 4 arguments, got 3"):
        function().prepare([x, x, 8], (1,))
    with pytest.raises(LaunchError, match="argument 2 is a Tensor, the cubin expects 4 bytes"):
        function().prepare([x, x, x, 2.0], (1,))
    with pytest.raises(LaunchError, match="argument 1 is a int, the cubin expects 8 bytes"):
        function().prepare([x, 1, 8, 2.0], (1,))


def test_parameters_lie_in_order_and_the_hidden_ones_are_null():
    x, out = torch.randn(8), torch.empty(8)
    launcher = function().prepare([x, out, 8, 2.5], (3,))
    assert [v.value for v in launcher.storage[1]] == [x.data_ptr(), out.data_ptr(), 8, 2.5, None, None]
    assert launcher.grid == (3, 1, 1)


def test_an_empty_grid_launches_nothing():
    class Driver:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was called")

    x = torch.randn(8)
    function(Driver()).prepare([x, x, 0, 1.0], (0,)).launch(0)


def test_without_cuda_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    _driver.cache_clear()
    with pytest.raises(LaunchError, match=r"pip install 'ingot\[cuda\]'"):
        load(Kernel("add_0", "add", "triton", "add_kernel", "add_0.cubin", ""), tmp_path / "add_0.cubin")


def loaded(source, folder):
    compiled = compile_source(source, gpu())
    path = folder / f"{compiled.name}.cubin"
    path.write_bytes(compiled.binary)
    kernel = Kernel(compiled.name, source.family, "triton", compiled.symbol, path.name, "", compiled.num_warps, compiled.shared_bytes, compiled.launch_pdl)
    return load(kernel, path)


def add_source(pdl):
    text = ADD if pdl else ADD.replace(", PDL: tl.constexpr", "").replace("    if PDL:\n        gdc_launch_dependents()\n        gdc_wait()\n", "")
    return Source("add", "triton", "add_kernel", text, {"x": "*fp32", "out": "*fp32", "n": "i32", "amount": "fp32"}, {"BLOCK": 256})


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_a_chain_of_launches_in_a_graph(pdl, tmp_path):
    add = loaded(add_source(pdl), tmp_path)
    assert add.launch_pdl == pdl
    values = [torch.randn(1000, device="cuda"), *(torch.empty(1000, device="cuda") for _ in range(20))]
    runs = [add.bind([a, b, 1000, 0.5], (4,)) for a, b in itertools.pairwise(values)]
    runs[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    values[-1].fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(values[-1], values[0] + 10.0)


@pytest.mark.gpu
def test_more_shared_memory_than_the_default(tmp_path):
    source = Source("transpose", "triton", "transpose_kernel", TRANSPOSE, {"x": "*fp32", "out": "*fp32"}, {"N": 128}, num_warps=8)
    transpose = loaded(source, tmp_path)
    assert transpose.shared_bytes > 48 << 10
    x, out = torch.randn(128, 128, device="cuda"), torch.empty(128, 128, device="cuda")
    transpose.bind([x, out], (1,))()
    torch.testing.assert_close(out, x.t())


@pytest.mark.gpu
def test_the_driver_refusing_is_an_error(tmp_path):
    x = torch.randn(8, device="cuda")
    with pytest.raises(LaunchError, match=r"add_\w+: launching a grid of \(1, 70000, 1\) failed: invalid argument"):
        loaded(add_source(False), tmp_path).bind([x, x, 8, 1.0], (1, 70000))()
    (tmp_path / "bad.cubin").write_bytes(b"no cubin")
    with pytest.raises(LaunchError, match=r"loading .*bad\.cubin failed"):
        load(Kernel("bad_0", "bad", "triton", "add_kernel", "bad.cubin", ""), tmp_path / "bad.cubin")
