"""Every Triton family against its op's reference: in Triton's interpreter on a CPU, and as cubins where there is a GPU."""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ingot.ops.library
import ingot.ops.triton
from ingot.artifacts.gate import bind, relative, states
from ingot.artifacts.launch_cuda import load
from ingot.artifacts.plan import Kernel
from ingot.compiler.codegen.triton import compile_source
from ingot.ops import OPS, formats
from ingot.ops.kernel import CLAIMS, Tickets
from ingot.ops.target import Target, gpu
from ingot.ops.triton.linear import prefetched

ingot.ops.triton.load()
torch.set_num_threads(1)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 6e-3, F16: 1e-3, F32: 2e-6}  # ‖out − ref‖ / ‖ref‖; rounding the result alone gives 2e-3, 3e-4, 3e-8
QUANTIZED_TOLERANCE = 6e-3  # a value may lie on either side of a rounding


_MADE = runpy.run_path(str(Path(__file__).with_name("triton_cases.py")))
CASES, delta_cases, quantized_case, quantized_moe_case = (_MADE[n] for n in ("CASES", "delta_cases", "quantized_case", "quantized_moe_case"))


class Device:
    """The GPU: sources become cubins, and cubins are launched without Triton."""

    def __init__(self, folder):
        self.folder = folder

    def kernel(self, source):
        if source.backend == "torch":
            return None  # a library's
        compiled = compile_source(source, gpu())
        path = self.folder / f"{compiled.name}.cubin"
        path.write_bytes(compiled.binary)
        return load(
            Kernel(compiled.name, source.family, "triton", compiled.symbol, path.name, "", compiled.num_warps, compiled.shared_bytes, compiled.launch_pdl), path
        )


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request, tmp_path):
    """(device, target, something with kernel(source))."""
    if request.param == "cuda":
        return "cuda", gpu(), Device(tmp_path)
    return "cpu", Target("cuda", "sm_90", ""), request.getfixturevalue("interpreter")


def error(call, inputs, outputs, before):
    """Largest relative error of outputs and states against the reference in float32; `before`: the states as they were."""
    exact = {n: v.float() if isinstance(v, torch.Tensor) and v.dtype in TOLERANCE else v for n, v in {**inputs, **before}.items()}
    exact |= {n: exact[n].clone() for n in before}
    expected = OPS[call.op].reference(*exact.values())
    expected = list(expected) if isinstance(expected, tuple) else [] if expected is None else [expected]
    return max(relative(a, b) for a, b in [*zip(outputs, expected, strict=True), *((inputs[n], exact[n]) for n in before)])


def rows_apart(candidate, inputs):
    """Arguments whose rows may lie apart as columns of something wider, which is NaN elsewhere."""
    made = dict(inputs)
    for name in {o.arg for launch in candidate.launches for o in launch.operands if o.rows}:
        t = inputs[name]
        wide = torch.full((len(t), t[0].numel() // 16 * 16 + 32), float("nan"), dtype=t.dtype, device=t.device)
        made[name] = wide[:, 8 : 8 + t[0].numel()].copy_(t.flatten(1)).unflatten(1, t.shape[1:])
    return made


def distinct(candidates):
    """What the interpreter can tell apart: not Gluon, which it does not know, and one candidate of those that differ in warps and stages alone."""
    known = [c for c in candidates if not any("gluon" in launch.source.text for launch in c.launches)]
    return list({tuple((s.text, repr(s.constants | {"THREADS": 0})) for s in (launch.source for launch in c.launches)): c for c in known}.values())


TILE_SIZE = re.compile("BLOCK_.*|SPLITS?|CHUNK_S|HEIGHT|PREFETCH|THREADS|WARPS|STAGES")


def unlike(candidates):
    """Of those that take the same branches of the same code the best one: they differ in the sizes of their tiles, or in how many parts they split a sum."""
    found = {}
    for c in candidates:
        branches = lambda constants: {n: v > 1 if isinstance(v, int) and TILE_SIZE.fullmatch(n) else v for n, v in constants.items()}
        found.setdefault(tuple((x.source.text, repr(branches(x.source.constants))) for x in c.launches), c)
    return list(found.values())


def check(candidates, case, call, dtype, machine, let_go):
    """Every candidate's results, and the states that it leaves, against the reference."""
    device, _, maker = machine
    kernel = lambda source: None if source.backend == "torch" else maker.kernel(source)
    for candidate in candidates:
        inputs = rows_apart(candidate, let_go(call, case.inputs(call, device)))
        before = {n: inputs[n].clone() for n in states(call)}
        outputs, run = bind(candidate, call, inputs, case.sizes, [kernel(launch.source) for launch in candidate.launches])
        run()
        if any(isinstance(t, Tickets) for t in candidate.scratch):  # were they not zero again, nobody would finish this time
            for output in outputs:
                output.fill_(float("nan"))
            run()
        # what a launch hands to the next one is rounded too
        tolerance = QUANTIZED_TOLERANCE if call.args.get("k_scale") is not None else TOLERANCE[dtype]
        assert error(call, inputs, outputs, before) < tolerance * len(candidate.launches) ** 0.5, candidate.name


def test_every_family_has_cases():
    assert set(CASES) == {op for op, backend in CLAIMS if backend == "triton"}


WITH_CODE_FOR_FLOAT16 = ("quantized_linear", "quantized_moe", "gated_delta_rule")


def of_every_type():
    """Operations, cases and types. What has no code of its own for float16 is tried in it on a GPU and nightly."""
    for op, cases in CASES.items():
        for name in cases:
            for dtype, short in ((BF16, "bf16"), (F16, "f16"), (F32, "f32")):
                late = dtype == F16 and op not in WITH_CODE_FOR_FLOAT16
                yield pytest.param(op, name, dtype, id=f"{op}-{name}-{short}", marks=pytest.mark.nightly if late else ())


@pytest.mark.parametrize(("op", "name", "dtype"), list(of_every_type()))
def test_agrees_with_the_reference(op, name, dtype, machine, let_go):
    device, target, _ = machine
    case = CASES[op][name]
    call = case.call(op, dtype)
    candidates = [c for claim in CLAIMS[op, "triton"] for c in claim(call, case.steps, target)]
    if "quantized" in op and dtype == F32:
        assert not candidates
        return
    assert candidates
    assert len({c.name for c in candidates}) == len(candidates)
    if device == "cpu":
        candidates = unlike(distinct(candidates))
        assert candidates
    check(candidates if dtype == BF16 else candidates[:1], case, call, dtype, machine, let_go)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["int4_group32_zero", "int4_channel"])
def test_programs_that_make_several_panels(form, tmp_path, let_go):
    """Of a product of one row: its loads for the next panel are on their way while one ends."""
    case = quantized_case(form, "none", 1, 2 * 6688, 1056, act="silu", norm=True)
    call = case.call("quantized_linear", BF16)
    [claim] = CLAIMS["quantized_linear", "triton"]
    several = [c for c in claim(call, case.steps, gpu()) if "_p" in c.name]
    assert several
    check(several, case, call, BF16, ("cuda", gpu(), Device(tmp_path)), let_go)


@pytest.mark.nightly
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, cases in CASES.items() for name in cases])
def test_every_tile_agrees(op, name, interpreter, let_go):
    """On a GPU all of them do in `test_agrees_with_the_reference`."""
    case, machine = CASES[op][name], ("cpu", Target("cuda", "sm_90", ""), interpreter)
    call = case.call(op, BF16)
    check(distinct([c for claim in CLAIMS[op, "triton"] for c in claim(call, case.steps, machine[1])]), case, call, BF16, machine, let_go)


def rounding_of(form):
    """How activations are rounded to the kind of a format's codes; None where no kernel multiplies those."""
    found = formats.get(form)
    kind, block = form.split("_")[0], getattr(found, "block", False)
    if kind == "fp8":
        return "fp8_e4m3_group128" if block else "fp8_e4m3_token"
    return None if kind == "int4" or found.zero else "int8_token" if found.group < 0 else f"int8_group{found.group}"


@pytest.mark.nightly
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 257, 512])
@pytest.mark.parametrize("form", formats.names())
def test_every_format_at_every_size(form, rows, machine, let_go):
    device, target, _ = machine
    act = "silu" if rows % 2 else None
    [claim] = CLAIMS["quantized_linear", "triton"]
    for activation in filter(None, ("none", rounding_of(form))):
        case = quantized_case(form, activation, rows, 256 if act else 72, 330, act, residual=act is None)
        call = case.call("quantized_linear", BF16)
        candidates = claim(call, case.steps, target)
        assert candidates
        check(distinct(candidates) if device == "cpu" else candidates, case, call, BF16, machine, let_go)


@pytest.mark.nightly
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("form", formats.names())
def test_experts_of_every_format(form, rows, machine, let_go):
    case = quantized_moe_case(form, rows, 2, 3, 128, 256, "silu")
    call = case.call("quantized_moe", BF16)
    candidates = CLAIMS["quantized_moe", "triton"][0](call, case.steps, machine[1])
    assert candidates
    check(distinct(candidates) if machine[0] == "cpu" else candidates, case, call, BF16, machine, let_go)


def test_experts_whose_rows_are_longer_than_a_block(monkeypatch, machine, let_go):
    monkeypatch.setattr(ingot.ops.triton.quantized_moe, "GEMV_TILES", ((16, 128, 1),))
    case = CASES["quantized_moe"]["int4_one"]
    call = case.call("quantized_moe", BF16)
    check(CLAIMS["quantized_moe", "triton"][0](call, case.steps, machine[1]), case, call, BF16, machine, let_go)


def test_what_experts_make_of_a_row_does_not_depend_on_the_others(interpreter):
    """Of deterministic steps: one token, and the same one among seventy."""
    case = CASES["moe"]["few"]
    call, target = case.call("moe", BF16), Target("cuda", "sm_90", "")
    steps = replace(case.steps, max_tokens=70, deterministic=True)
    candidate = CLAIMS["moe", "triton"][0](call, steps, target)[0]
    inputs = {n: a for n, a in case.inputs(call, "cpu").items() if n in ("w_in", "w_out")}
    generator = torch.Generator().manual_seed(70)
    x, ids = torch.randn(70, 72, generator=generator).bfloat16(), torch.rand(70, 6, generator=generator).argsort(-1)[:, :4].contiguous()
    weights = torch.rand(70, 4, generator=generator).bfloat16()
    made = {}
    for rows in (70, 1):
        tokens = {"x": x[-rows:], "expert_ids": ids[-rows:], "expert_weights": weights[-rows:]}
        values = {n: tokens.get(n, inputs.get(n, a)) for n, a in call.args.items()}
        outputs, run = bind(candidate, call, values, {"T": rows}, [interpreter.kernel(launch.source) for launch in candidate.launches])
        run()
        made[rows] = outputs[0]
    assert torch.equal(made[70][-1:], made[1])


def test_chunks_of_one_key_again_and_again_do_not_cancel(machine):
    """What each token adds to the state is then the difference to the token before; powers of the triangle that is inverted reach 10¹⁸."""
    device, target, maker = machine
    case = delta_cases()["long"]
    call = case.call("gated_delta_rule", F16)
    inputs = case.inputs(call, device)
    inputs |= {"k": inputs["k"][:1].expand(inputs["k"].shape).contiguous(), "g": torch.zeros_like(inputs["g"]), "beta": torch.ones_like(inputs["beta"])}
    before = inputs["delta_state"].clone()
    candidate = next(c for claim in CLAIMS[call.op, "triton"] for c in claim(call, case.steps, target) if c.name.startswith("chunk64"))
    outputs, run = bind(candidate, call, inputs, case.sizes, [maker.kernel(launch.source) for launch in candidate.launches])
    run()
    assert error(call, inputs, outputs, {"delta_state": before}) < 1e-2


@pytest.mark.parametrize(
    ("depth", "bits", "split", "block_k", "alone", "ahead"),
    [(8192, 16, 1, 256, False, 2048), (8192, 16, 1, 256, True, 1024), (1024, 8, 1, 256, False, 256), (1024, 16, 4, 256, False, 512),
     (72, 16, 1, 64, False, 144), (36, 16, 1, 32, False, 0), (1280, 16, 4, 256, False, 0), (256, 4, 2, 128, False, 64), (1432, 16, 1, 64, False, 704)],
)  # fmt: skip
def test_what_is_asked_for_ahead_lies_in_its_row_and_is_aligned(depth, bits, split, block_k, alone, ahead):
    """Of 32 rows, each `depth` long: pieces begin and end at multiples of 16 bytes, and none begins beyond what is its part's."""
    assert prefetched(depth, bits, split, 32, block_k, alone) == ahead
