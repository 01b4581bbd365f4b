"""Regions: which ops are claimed, that both kernels of one compute what the region says, and how a graph is divided into them."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ingot.artifacts.gate import bind, relative
from ingot.artifacts.launch_tvm import load
from ingot.artifacts.plan import Kernel
from ingot.compiler.codegen.region import candidates
from ingot.compiler.codegen.region_program import Value, parse
from ingot.compiler.codegen.triton import compile_source
from ingot.compiler.codegen.tvm import compile_sources
from ingot.compiler.from_function import from_function
from ingot.compiler.passes.group_regions import group_regions
from ingot.ops import Graph, InputSpec
from ingot.ops.dims import evaluate
from ingot.ops.graph import Region, target_name
from ingot.ops.kernel import Call, Candidate, Steps, Tensor
from ingot.ops.target import Target, host

torch.set_num_threads(1)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 3e-6, F16: 1e-3, BF16: 4e-3}  # rounding the result once
STEPS = Steps(max_tokens=64, max_seqs=4, max_num_new=64, max_rows=4, exact=False)
SM_90 = Target("cuda", "sm_90", "")
AVX2 = Target("cpu", "x86-64:avx2+fma", "")

Specs = dict[str, tuple[torch.dtype, tuple[Any, ...]]]
ROWS: Specs = {"x": (F32, ("T", 99))}


def activations(x: torch.Tensor) -> list[torch.Tensor]:
    return [F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.relu(x).square(), F.softplus(x), F.leaky_relu(x), F.elu(x), F.mish(x),
            F.hardswish(x), F.logsigmoid(x), torch.tanh(x / 3) * 3, torch.sigmoid(x)]  # fmt: skip


def elementary(x: torch.Tensor) -> list[torch.Tensor]:
    y = x.abs() + 0.1
    return [y.log(), x.sin(), x.cos(), x.pow(2), x**3, y**0.5, y**-0.5, 1 / y, x.floor(), x.exp() - 3, 2 - x, torch.log1p(y * 1e-4),
            torch.expm1(x * 1e-3), torch.expm1(x), torch.erf(x)]  # fmt: skip


def selection(x: torch.Tensor) -> list[torch.Tensor]:
    positive = x > 0
    return [x.clamp(-1, 0.5), x.clamp(min=0.1), torch.where((positive & (x <= 1)) | ~(x >= -1), x, 7.0), x.masked_fill(x < 0, -1e9), positive.float() * x,
            torch.maximum(x, x * x), torch.minimum(x, x * x), torch.where(x == x.amax(-1, keepdim=True), 1.0, x), torch.where(x != 0, x, 2.0)]  # fmt: skip


def reductions(x: torch.Tensor) -> list[torch.Tensor]:
    return [x.softmax(-1), x.log_softmax(-1), x.sum(-1), x.mean(-1, keepdim=True), x.amax(-1), x.amin(-1, keepdim=True) * x, x.var(-1, keepdim=True),
            x - x.mean(-1).unsqueeze(-1), F.normalize(x, dim=-1), x.logsumexp(-1, keepdim=True)]  # fmt: skip


CASES: dict[str, tuple[Callable[..., list[torch.Tensor]], Specs]] = {
    "activations": (activations, ROWS),
    "elementary": (elementary, ROWS),
    "selection": (selection, ROWS),
    "reductions": (reductions, ROWS),
    "layer_norm": (lambda x, w, b: [F.layer_norm(x, (100,), w, b)], {"x": (BF16, (1, "T", 100)), "w": (BF16, (100,)), "b": (F32, (100,))}),
    "residual": (lambda x, y: [x + y, F.layer_norm(torch.add(x, y, alpha=2), (96,))], {"x": (F16, ("T", 96)), "y": (F32, ("T", 96))}),
    "long_rows": (lambda x: [torch.tanh(x / 30) * 30], {"x": (F32, ("T", 9001))}),
    "scalar": (lambda x, s: [x * s], {"x": (BF16, ("T", 64)), "s": (BF16, ())}),
    "heads": (lambda x, c, w, n: [x * c * w + n], {"x": (F16, ("T", 6, 63)), "c": (F32, ("T", 1, 63)), "w": (F32, (6, 1)), "n": (F32, ("T", 6, 1))}),
    "four_dims": (lambda x, c: [(x * c).sum(-1), x - c], {"x": (F32, ("T", 3, 5, 17)), "c": (F32, (3, 1, 17))}),
    "fixed_rows": (lambda x, c: [x * c], {"x": (F32, (3, 33)), "c": (F32, (33,))}),
    "vector": (lambda x, c: [x / c], {"x": (F32, (33,)), "c": (F32, (33,))}),
    "one_column": (lambda x, c: [x * c], {"x": (F32, ("T", 1)), "c": (F32, ("T", 1))}),
    "columns": (lambda x_columns, y, z_columns: [F.silu(x_columns) * y, z_columns + y],
                {"x_columns": (BF16, ("T", 3, 32)), "y": (F32, ("T", 1, 32)), "z_columns": (F32, ("T", 3, 32))}),
    "odd_columns": (lambda x_columns: [x_columns.softmax(-1)], {"x_columns": (F32, ("T", 21))}),
}  # fmt: skip
"""Arguments whose names end in `_columns` are a part of something wider."""


def columns(wide: torch.Tensor, shape: Any) -> torch.Tensor:
    """A view of this shape of `wide`, as `wide_shape` has it."""
    return wide[:, 8:-8].unflatten(1, shape[1:])


def wide_shape(shape: Any) -> tuple[Any, int]:
    return shape[0], math.prod(shape[1:]) + 16


def graph_of(fn: Callable[..., list[torch.Tensor]], specs: Specs) -> Graph:
    return from_function(fn, {n: InputSpec(dtype, shape) for n, (dtype, shape) in specs.items()})


def region_of(fn: Callable[..., list[torch.Tensor]], specs: Specs) -> tuple[Region, Call]:
    """All of `fn` as one region."""
    graph = graph_of(fn, specs)
    for name, placeholder in graph.placeholders.items():
        if name.endswith("_columns"):
            value = placeholder.meta["val"]
            with graph.fake_mode:
                placeholder.meta["val"] = columns(value.new_empty(wide_shape(value.shape)), value.shape)
    results = graph.fx.output_node().args[0]
    region = Region("region", graph.fx)
    args = {n: Tensor(p.meta["val"].dtype, graph.shape(p)) for n, p in graph.placeholders.items()}
    return region, Call("region", args, tuple(Tensor(r.meta["val"].dtype, graph.shape(r)) for r in results), region)


def claim(fn: Callable[..., list[torch.Tensor]], specs: Specs, target: Target) -> list[Candidate]:
    region, call = region_of(fn, specs)
    return candidates(region, call, STEPS, target)


def check(name: str, candidate: Candidate, kernel: Any, tokens: int) -> None:
    region, call = region_of(*CASES[name])
    generator = torch.Generator().manual_seed(tokens)
    inputs = {n: torch.randn([evaluate(d, {"T": tokens}) for d in t.shape], generator=generator).to(t.dtype) for n, t in call.args.items()}
    for n, x in inputs.items():
        if n.endswith("_columns"):
            inputs[n] = columns(torch.full(wide_shape(x.shape), float("nan"), dtype=x.dtype), x.shape).copy_(x)
    outputs, run = bind(candidate, call, inputs, {"T": tokens}, [kernel])
    run()
    expected = region(*(x.double() for x in inputs.values()))
    for i, (output, exact) in enumerate(zip(outputs, expected, strict=True)):
        assert relative(output, exact) < TOLERANCE[output.dtype], f"result {i}"


@pytest.fixture(scope="module")
def shared_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sources = {name: claim(*case, host())[0].launches[0].source for name, case in CASES.items()}
    return dict(zip(sources, compile_sources(list(sources.values()), host(), tmp_path_factory.mktemp("region"), 2), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_cpu_kernel(name: str, shared_objects: dict[str, Path]) -> None:
    (candidate,) = claim(*CASES[name], host())
    kernel = load(Kernel("region", "region", "tvm", "region", "", ""), shared_objects[name])
    for tokens in (1, 7, 64):
        check(name, candidate, kernel, tokens)


def elements(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's elements in memory's order, those between rows that lie apart too."""
    return tensor.as_strided((1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)),), (1,))


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Any, list[Any], tuple[int, ...]], None]]:
    """Runs a Triton source on CPU tensors, in a process with Triton's interpreter."""
    folder = tmp_path_factory.mktemp("triton")
    memory = torch.from_file(str(folder / "memory"), shared=True, size=16 << 20, dtype=torch.uint8)
    script = Path(__file__).parent.parent / "ops" / "triton_interpreter.py"
    with subprocess.Popen(
        [sys.executable, str(script), str(folder / "memory"), str(16 << 20)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(source: Any, args: list[Any], grid: tuple[int, ...]) -> None:
            path = folder / f"{hash(source.text):x}.py"
            path.write_text(source.text)
            named: dict[str, Any] = dict(zip(source.signature, args, strict=True))
            places, end = {}, 0
            for name, arg in named.items():
                if isinstance(arg, torch.Tensor):
                    flat = elements(arg)
                    places[name] = memory[end : end + flat.nbytes]
                    places[name].copy_(flat.view(torch.uint8))
                    named[name] = {"begin": end, "end": end + flat.nbytes, "dtype": str(arg.dtype).removeprefix("torch.")}
                    end += -(-flat.nbytes // 256) * 256
            job = {"path": str(path), "symbol": source.symbol, "constants": source.constants | {"PDL": False}, "args": named, "grid": grid}
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline()) == ""
            for arg, (name, place) in zip([a for a in args if isinstance(a, torch.Tensor)], places.items(), strict=True):
                assert name in source.signature
                elements(arg).copy_(place.view(arg.dtype))

        yield run
        process.stdin.close()


@pytest.mark.parametrize("name", CASES)
def test_gpu_kernel(name: str, interpreter: Callable[[Any, list[Any], tuple[int, ...]], None]) -> None:
    class Interpreted:
        def bind(self, args: list[Any], grid: tuple[int, ...]) -> Callable[[], None]:
            return lambda: interpreter(candidate.launches[0].source, args, grid)

    candidate = claim(*CASES[name], SM_90)[0]
    check(name, candidate, Interpreted(), 7)


def test_arguments_that_share_a_fake_tensor_are_two() -> None:
    region, call = region_of(lambda x, y: [x - y], {"x": (F32, ("T", 8)), "y": (F32, ("T", 8))})
    x, y = (n for n in region.module.graph.nodes if n.op == "placeholder")
    y.meta["val"] = x.meta["val"]
    assert [a.source for a in parse(region, call).outputs[0].args if isinstance(a, Value)] == ["x", "y"]


@pytest.mark.parametrize("target", [AVX2, SM_90], ids=lambda t: t.kind)
def test_columns_of_something_wider_are_read_where_they_are(target: Target) -> None:
    operands = [o for launch in claim(*CASES["columns"], target)[0].launches for o in launch.operands]
    assert {o.arg for o in operands if o.rows} == {"x_columns", "z_columns"}


def test_gpu_kernel_compiles_without_a_gpu() -> None:
    for candidate in claim(*CASES["reductions"], SM_90):
        assert compile_source(candidate.launches[0].source, SM_90).binary[1:4] == b"ELF"


@pytest.mark.parametrize(
    ("fn", "specs"),
    [
        (lambda x: [x @ x.t()], {"x": (F32, (8, 8))}),
        (lambda x: [x.sum(0)], {"x": (F32, ("T", 8))}),
        (lambda x: [x.cumsum(-1)], {"x": (F32, ("T", 8))}),
        (lambda x: [x + 1], {"x": (torch.int32, ("T", 8))}),
        (lambda x: [x > 0], {"x": (F32, ("T", 8))}),
        (lambda x: [x.topk(2)[0]], {"x": (F32, ("T", 8))}),
        (lambda x: [x * 2], {"x": (F32, (8, "T"))}),
        (lambda x, y: [x * 2, y * 2], {"x": (F32, ("T", 8)), "y": (F32, ("T", 9))}),
        (lambda x, w: [x * w, w + 1], {"x": (F32, ("T", 8)), "w": (F32, (8,))}),
        (lambda x: [x**1.7], {"x": (F32, ("T", 8))}),
        (lambda x: [x.double() * 2], {"x": (F32, ("T", 8))}),
    ],
)
@pytest.mark.parametrize("target", [AVX2, SM_90], ids=lambda t: t.kind)
def test_other_regions_are_declined(fn: Callable[..., list[torch.Tensor]], specs: Specs, target: Target) -> None:
    assert claim(fn, specs, target) == []


def test_rows_too_wide_to_reduce_on_a_gpu_are_declined() -> None:
    specs: Specs = {"x": (F32, ("T", 40000))}
    assert claim(lambda x: [x.softmax(-1)], specs, SM_90) == []
    assert claim(lambda x: [x * 2], specs, SM_90)


def same(graph: Graph, grouped: Graph, **shapes: tuple[int, ...]) -> None:
    inputs = {n: torch.randn(s) for n, s in shapes.items()}
    for a, b in zip(graph.run(inputs)[0], grouped.run(inputs)[0], strict=True):
        assert torch.equal(a, b)


def calls(graph: Graph) -> list[str]:
    return [target_name(n.target).split("_")[0] for n in graph.fx.nodes if n.op == "call_function" and "getitem" not in target_name(n.target)]


def test_neighbours_become_one_region() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        h = torch.where(x > 0, x, x.exp() - 1) * w
        return [h, (h - h.mean(-1, keepdim=True)).tanh()]

    graph = graph_of(fn, {"x": (F32, ("T", 8)), "w": (F32, (8,))})
    grouped = group_regions(graph, AVX2)
    grouped.verify()
    assert calls(grouped) == ["region"]
    same(graph, grouped, x=(5, 8), w=(8,))


def test_a_matrix_product_divides_what_is_around_it() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        h = x.tanh() * 2
        return [(h @ w + h).exp()]

    graph = graph_of(fn, {"x": (F32, ("T", 8)), "w": (F32, (8, 8))})
    grouped = group_regions(graph, AVX2)
    grouped.verify()
    assert calls(grouped) == ["region", "aten.matmul", "region"]
    same(graph, grouped, x=(5, 8), w=(8, 8))


def test_a_group_is_taken_apart_when_another_has_come_between() -> None:
    """a and 2a become one region, which must wait for 2a; then b + a cannot be computed with b, which the product needs before."""

    def fn(x: torch.Tensor, z: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        a = x.sin()
        b = z.cos()
        product = b @ w
        return [a * 2, b + a, product]

    graph = graph_of(fn, {"x": (F32, (5, 8)), "z": (F32, (3, 5, 8)), "w": (F32, (8, 8))})
    grouped = group_regions(graph, AVX2)
    grouped.verify()
    assert sorted(calls(grouped)) == ["aten.matmul", "region", "region", "region"]
    same(graph, grouped, x=(5, 8), z=(3, 5, 8), w=(8, 8))


def test_equal_groups_have_equal_names() -> None:
    graph = graph_of(lambda x, w: [((x * 2).tanh() @ w * 2).tanh() @ w], {"x": (F32, ("T", 8)), "w": (F32, (8, 8))})
    names = [n.target.name for n in group_regions(graph, AVX2).fx.nodes if isinstance(n.target, Region)]
    assert len(names) == 2
    assert len(set(names)) == 1


def test_a_graph_shows_what_is_in_a_region() -> None:
    text = str(group_regions(graph_of(lambda x: [torch.tanh(x / 30) * 30], {"x": (F32, ("T", 8))}), AVX2))
    assert "    y1: float32[T, 8] = aten.tanh(%y0)\n" in text
