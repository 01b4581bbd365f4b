"""A layer as one kernel: the same numbers as its launches, in Triton's interpreter with one program, and a cubin for many."""

import math
import re

import pytest
import torch

import ingot.ops.triton
from ingot.artifacts.plan import Arg, Entry, Grid, Value, Variant
from ingot.compiler.codegen.persistent import SYMBOL, TICKETS, layers, persistent
from ingot.compiler.codegen.triton import compile_source, kernel_name
from ingot.ops.dims import evaluate
from ingot.ops.kernel import Call, Steps, Tensor, Tickets, claimants
from ingot.ops.target import Target
from ingot.runtime.bind import bind, tickets

ingot.ops.triton.load()
TARGET, BF16, CPU = Target("cuda", "sm_90", ""), torch.bfloat16, torch.device("cpu")
D, LAYERS = 40, 2


def decoder(tokens, width):
    """A plan of LAYERS times a norm with its product, and a product with a residual, whose sum is split where rows are few; its sources; its weights."""
    steps = Steps(tokens, tokens, 1, tokens, True)
    x, wide = Tensor(BF16, ({"T": 1}, D)), Tensor(BF16, ({"T": 1}, width))
    normed = {"x": x, "norm_weight": Tensor(BF16, (D,)), "weight": Tensor(BF16, (width, D)), "bias": None, "eps": 1e-5, "offset": 0.0}
    added = {"x": wide, "weight": Tensor(BF16, (D, width)), "bias": None, "residual": x}
    calls = [Call("rms_norm_linear", normed, (wide,)), Call("linear_add", added, (x,))]
    values = {"x0": Value("x0", "bfloat16", x.shape, "input"), "unrelated": Value("unrelated", "bfloat16", x.shape, "arena")}
    entries, sources, weights, size = [], {}, {}, 0

    def place(name, tensor):
        nonlocal size
        storage = "tickets" if isinstance(tensor, Tickets) else "arena"
        shape = tuple(d if isinstance(d, int) else d["T"] * tokens for d in tensor.shape)
        values[name] = Value(name, str(tensor.dtype).removeprefix("torch."), tensor.shape, storage, arena_offset=size)
        size += -(-torch.empty(shape, dtype=tensor.dtype).nbytes // 256) * 256
        return name

    for layer in range(LAYERS):
        held = {"x": f"x{layer}", "residual": f"x{layer}"}
        for call in calls:
            candidate = claimants(call, steps, TARGET)[0]
            assert all(launch.source.backend == "triton" for launch in candidate.launches)
            out = place(f"x{layer + 1}" if call.op == "linear_add" else f"h{layer}", call.results[0])
            scratch = [place(f"{call.op}{layer}.{i}", t) for i, t in enumerate(candidate.scratch)]
            for name, arg in call.args.items():
                if isinstance(arg, Tensor) and "weight" in name:
                    held[name] = f"{call.op}.{name}{layer}"
                    weights[held[name]] = torch.randn(arg.shape).to(BF16)
                    values[held[name]] = Value(held[name], "bfloat16", arg.shape, "weight")
            for launch in candidate.launches:
                kernel = kernel_name(launch.source, TARGET)
                sources[kernel] = launch.source
                args = tuple(argument(o, held, out, scratch) for o in launch.operands)
                entries.append(Entry(call.op, call.op, "triton", args, (out, *scratch), kernel, tuple(Grid(d, b) for d, b in launch.grid)))
            held["x"] = out
    plan = Variant("forward", "decode", tokens, tokens, 1, tokens, (tokens,), tuple(values.values()), tuple(entries), (f"x{LAYERS}",), size)
    return plan, sources, weights


def argument(operand, held, out, scratch):
    if operand.size is not None:
        return Arg(dim=operand.size)
    return Arg(value=held[operand.arg] if operand.arg else out if operand.out is not None else scratch[operand.scratch])


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_layer_as_one_kernel_computes_what_its_launches_do(tokens, interpreter):
    torch.manual_seed(0)
    plan, sources, weights = decoder(tokens, 130 if tokens == 1 else 1100)
    assert len(layers(plan)) == LAYERS
    joined, source = persistent(plan, sources, num_programs=1)
    assert len(joined.entries) == LAYERS
    roots = weights | {"x0": torch.randn(tokens, D).to(BF16)}
    results = []
    for variant, texts in ((plan, sources), (joined, {SYMBOL: source})):
        drawn = tickets([variant], CPU)
        kernels = {n: interpreter.kernel(s) for n, s in texts.items()}
        arena = torch.full((plan.arena_bytes,), 0xFF, dtype=torch.uint8)  # NaN
        bound = bind(variant, {"T": tokens, "S": tokens, "R": tokens}, roots | drawn, arena, kernels, CPU)
        bound.run()
        results.append(bound.results[0].clone())
        assert not any(t.any() for t in drawn.values())
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_many_programs_wait_for_each_other():
    plan, sources, _ = decoder(3, 1100)
    joined, source = persistent(plan, sources, num_programs=264, num_warps=8)
    programs = [math.prod(-(-evaluate(g.dim, {"T": 3}) // g.block) for g in e.grid) for e in plan.entries[layers(plan)[0]]]
    assert [int(n) for n in re.findall(r"EXPECTED=(\d+)", source.text)] == [0, *(min(n, 264) for n in programs[:-1])]
    drawn = next(v for v in joined.values if v.name == TICKETS)
    assert drawn.shape == (len(programs),)
    assert drawn.offset >= max(v.shape[0] for v in plan.values if v.storage == "tickets")
    assert compile_source(source, TARGET).launch_pdl


def test_what_does_not_repeat_has_no_layers():
    plan, sources, _ = decoder(1, 130)
    once = Variant("forward", "once", 1, 1, 1, 1, (1,), plan.values, plan.entries[:2], plan.results, plan.arena_bytes)
    assert layers(once) == []
    with pytest.raises(ValueError, match="no sequence of kernels that repeats"):
        persistent(once, sources, 132)
