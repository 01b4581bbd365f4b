"""Every Triton family against its op's reference: in Triton's interpreter on a CPU, and as cubins where there is a GPU."""

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import ingot.ops.triton
import pytest
import torch
from ingot.artifacts.launch_cuda import load
from ingot.artifacts.plan import Kernel
from ingot.compiler.codegen.triton import compile_source
from ingot.compiler.gate import bind, error
from ingot.ops import OPS
from ingot.ops.dims import evaluate
from ingot.ops.kernel import CLAIMS, Call, Steps, Tensor
from ingot.ops.target import Target, gpu

ingot.ops.triton.load()
torch.set_num_threads(1)

BF16, F16, F32, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
T, R, S, S1, P, N = {"T": 1}, {"R": 1}, {"S": 1}, {"S": 1, "": 1}, {"P_full": 1}, {"N_full": 1}
TOLERANCE = {BF16: 6e-3, F16: 1e-3, F32: 2e-6}  # ‖out − ref‖ / ‖ref‖; rounding the result alone gives 2e-3, 3e-4, 3e-8
MEMORY_BYTES = 32 << 20


@dataclass
class Interpreter:
    """A process with Triton's interpreter; tensors travel through a file that both map."""

    process: subprocess.Popen
    memory: torch.Tensor
    folder: Path

    def kernel(self, source):
        path = self.folder / f"{source.family}_{hash(source.text):x}.py"
        path.write_text(source.text)
        return Interpreted(self, source, path)


@dataclass
class Interpreted:
    interpreter: Interpreter
    source: object
    path: Path

    def bind(self, args, grid):
        return lambda: self.run(args, grid)

    def run(self, args, grid):
        memory, end, named, placed = self.interpreter.memory, 0, {}, []
        for name, arg in zip(self.source.signature, args, strict=True):
            named[name] = arg
            if isinstance(arg, torch.Tensor):
                begin, end = end, end + arg.nbytes
                placed.append((arg, memory[begin:end]))
                named[name] = {"begin": begin, "end": end, "dtype": str(arg.dtype).removeprefix("torch.")}
                end += -end % 256
        assert end <= MEMORY_BYTES
        for tensor, place in placed:
            place.copy_(tensor.flatten().view(torch.uint8))
        job = {"path": str(self.path), "symbol": self.source.symbol, "constants": self.source.constants, "args": named, "grid": grid}
        process = self.interpreter.process
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        failure = json.loads(process.stdout.readline() or '"the interpreter died"')
        assert not failure, failure
        for tensor, place in placed:
            tensor.copy_(place.view(tensor.dtype).view(tensor.shape))


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    memory = torch.from_file(str(folder / "memory"), shared=True, size=MEMORY_BYTES, dtype=torch.uint8)
    script = Path(__file__).with_name("triton_interpreter.py")
    command = [sys.executable, str(script), str(folder / "memory"), str(MEMORY_BYTES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Interpreter(process, memory, folder)
        process.stdin.close()


class Device:
    """The GPU: sources become cubins, and cubins are launched without Triton."""

    def __init__(self, folder):
        self.folder = folder

    def kernel(self, source):
        compiled = compile_source(source, gpu())
        path = self.folder / f"{compiled.name}.cubin"
        path.write_bytes(compiled.binary)
        return load(Kernel(compiled.name, source.family, "triton", compiled.symbol, path.name, "", compiled.num_warps, compiled.shared_bytes), path)


@pytest.fixture(params=["interpreter", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])])
def machine(request, tmp_path):
    """(device, target, something with kernel(source))."""
    if request.param == "cuda":
        return "cuda", gpu(), Device(tmp_path)
    return "cpu", Target("cuda", "sm_90", ""), request.getfixturevalue("interpreter")


@dataclass(frozen=True)
class Case:
    """Arguments of a call, in the schema's order: a `Tensor` of dtype None has the activations' type; `values` gives index arrays."""

    args: dict
    results: tuple
    sizes: dict = field(default_factory=lambda: {"T": 5})
    values: dict = field(default_factory=dict)
    max_num_new: int = 0  # 0: as many as there are tokens
    page_size: int = 16

    def call(self, op, dtype):
        typed = lambda t: replace(t, dtype=dtype) if isinstance(t, Tensor) and t.dtype is None else t
        return Call(op, {n: typed(a) for n, a in self.args.items()}, tuple(typed(r) for r in self.results))

    @property
    def steps(self):
        t = self.sizes.get("T", 1)
        return Steps(t, self.sizes.get("S", 1), self.max_num_new or t, self.sizes.get("R", 1), False, self.page_size)

    def inputs(self, call, device):
        generator = torch.Generator().manual_seed(7)
        made = {}
        for name, arg in call.args.items():
            if name in self.values:
                made[name] = self.values[name].to(device)
            elif isinstance(arg, Tensor):
                made[name] = torch.randn([evaluate(d, self.sizes) for d in arg.shape], generator=generator).to(arg.dtype).to(device)
            else:
                made[name] = arg
        return made


def tensor(*shape, dtype=None):
    return Tensor(dtype, shape)


def norm_cases(residual):
    extra = {"residual": tensor(T, 72)} if residual else {}
    outs = 2 if residual else 1
    return {
        "odd": Case({"x": tensor(T, 72), **extra, "weight": tensor(72), "eps": 1e-6, "offset": 0.0}, (tensor(T, 72),) * outs),
        "bare": Case({"x": tensor(T, 72), **extra, "weight": None, "eps": 1e-5, "offset": 0.0}, (tensor(T, 72),) * outs),
        "gemma": Case({"x": tensor(T, 72), **extra, "weight": tensor(72, dtype=F32), "eps": 1e-6, "offset": 1.0}, (tensor(T, 72),) * outs),
    }


def linear_cases(op):
    cases = {}
    for rows, n, k, bias in ((1, 40, 520, True), (5, 72, 330, False), (40, 50, 96, True), (150, 72, 130, True)):
        args = {"x": tensor(T, k), "weight": tensor(2 * n if op == "linear_glu" else n, k)}
        if op == "linear_glu":
            args["act"] = ("silu", "gelu", "gelu_tanh", "relu")[len(cases)]
        else:
            args["bias"] = tensor(n) if bias else None
        if op == "linear_add":
            args["residual"] = tensor(T, n)
        cases[f"rows{rows}"] = Case(args, (tensor(T, n),), {"T": rows})
    return cases


CASES = {
    "rms_norm": norm_cases(False) | {"heads": Case({"x": tensor(T, 3, 16), "weight": tensor(16), "eps": 1e-6, "offset": 0.0}, (tensor(T, 3, 16),), {"T": 70})},
    "add_rms_norm": norm_cases(True),
    "linear": linear_cases("linear") | {"split": Case({"x": tensor(T, 1100), "weight": tensor(24, 1100), "bias": tensor(24)}, (tensor(T, 24),), {"T": 3})},
    "linear_add": linear_cases("linear_add"),
    "linear_glu": linear_cases("linear_glu"),
}


def test_every_family_has_cases():
    assert set(CASES) == {op for op, backend in CLAIMS if backend == "triton"}


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, cases in CASES.items() for name in cases])
def test_agrees_with_the_reference(op, name, dtype, machine):
    device, target, maker = machine
    case = CASES[op][name]
    call = case.call(op, dtype)
    candidates = [c for claim in CLAIMS[op, "triton"] for c in claim(call, case.steps, target)]
    assert candidates
    assert len({c.name for c in candidates}) == len(candidates)
    for candidate in candidates if dtype == BF16 else candidates[:1]:
        inputs = case.inputs(call, device)
        before = {n: inputs[n].clone() for n in OPS[op].states}
        outputs, run = bind(candidate, call, inputs, case.sizes, [maker.kernel(launch.source) for launch in candidate.launches])
        run()
        assert error(call, inputs, outputs, before) < TOLERANCE[dtype], candidate.name
