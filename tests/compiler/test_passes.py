"""Every pass: its example changes, both sides compute the same, and the graph still verifies."""

from pathlib import Path

import pytest
import torch
from torch import fx

from ingot.compiler.from_function import from_function
from ingot.compiler.passes.gather_early import example as gather_early_example
from ingot.compiler.passes.gather_early import gather_early
from ingot.compiler.passes.group_regions import group_regions
from ingot.compiler.pipeline import MANY_ROWS, PIPELINE, PROMPTS, count, lower_further
from ingot.ops import Graph, GraphError, InputSpec
from ingot.ops.dims import show
from ingot.ops.graph import Region, op_of
from ingot.ops.target import Target

CPU = Target("cpu", "x86-64:avx2+fma", "")
CUDA = Target("cuda", "sm_90", "")
PASSES = PIPELINE + PROMPTS + MANY_ROWS
FOR_CUDA = {"fuse_attention", "fuse_norm_linear", "round_glu"}  # passes that leave a CPU's graph alone
ON_CUDA = FOR_CUDA | {"quantize_experts"}  # which rounds rows on a CPU, so that the two sides differ


def modules():
    import importlib

    return {p.__name__: (p, importlib.import_module(p.__module__)) for p in PASSES}


def values(graph: Graph, tokens: int) -> dict[str, torch.Tensor]:
    sizes = {"T": tokens, "S": 2, "S+1": 3, "R": 3, "P_full": 3}
    batch = {
        "slot_mapping_full": torch.randperm(4 * 16)[:tokens],
        "cu_seqlens_q": torch.tensor([0, tokens // 2, tokens]),
        "seq_lens": torch.tensor([tokens // 2 + 20, tokens - tokens // 2 + 3]),
        "page_table_full": torch.randint(0, 4, (2, 3)),
        "rows": torch.randint(0, tokens, (3,)),
    }
    made = {}
    for name, spec in graph.inputs.items():
        shape = [sizes[n] if isinstance(n, str) else n for n in spec.shape]
        made[name] = batch[name].to(spec.dtype) if name in batch else torch.randn(shape, dtype=spec.dtype)
    made |= {n: torch.randn(4, *s.shape).to(s.dtype) for n, s in graph.states.items()}
    return made


def weights(before: Graph, after: Graph) -> dict[str, torch.Tensor]:
    tensors = {source: torch.randn(w.shape).to(w.dtype) for w in before.weights.values() for source in w.recipe.sources}
    return {n: w.recipe.run(tensors, g.constants) for g in (before, after) for n, w in g.weights.items()}


@pytest.mark.parametrize("name", [p.__name__ for p in PASSES])
@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_both_sides_agree(name: str, tokens: int) -> None:
    torch.manual_seed(tokens)
    run, module = modules()[name]
    before = module.example()
    text = str(before)
    after = run(before, CUDA if name in ON_CUDA else CPU)
    after.verify()
    assert str(before) == text, "a pass must not change its argument"
    assert str(after) != text, "the example must show what the pass does"
    inputs, params = values(before, tokens), weights(before, after)
    old_results, old_states = before.run({**inputs, **{n: params[n] for n in before.weights}})
    new_results, new_states = after.run({**inputs, **{n: params[n] for n in after.weights}})
    for a, b in zip([*old_results, *old_states.values()], [*new_results, *new_states.values()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


EXPECTED = {
    "merge_siblings": {"linear": 1},
    "fuse_glu": {"linear_glu": 2},
    "fuse_residual": {"linear_add": 1},
    "fuse_add_norm": {"add_rms_norm": 1},
    "fuse_rope_kv": {"qkv_rope_kv_write": 2},
    "fuse_latent_write": {"latent_rope_write": 2, "head_linear": 2, "mla_attention": 2},
    "quantize_linears": {"quantized_linear": 3},
    "fuse_attention": {"qkv_attention": 2},
    "fuse_norm_linear": {"rms_norm_linear": 1, "rms_norm_linear_glu": 1, "quantized_linear": 1, "add_rms_norm_quantized_linear": 1},
    "group_regions": {"linear": 1},
    "fold_weight_views": {"head_linear": 2},
    "clean_views": {},
    "straighten_experts": {"grouped_linear": 1, "moe": 1},
    "ungroup_columns": {"linear": 1},
    "fuse_router": {"route": 3},
    "quantize_experts": {"quantized_moe": 1, "route": 1},
    "gather_early": {"gather_rows": 2, "linear_add": 1, "linear_glu": 1, "add_rms_norm": 1, "linear": 2},
    "round_glu": {"quantized_linear": 1, "glu_quantized_linear": 1},
}


@pytest.mark.parametrize("name", sorted(FOR_CUDA))
def test_what_is_for_cuda_leaves_a_cpu_alone(name: str) -> None:
    run, module = modules()[name]
    before = module.example()
    assert str(run(before, CPU)) == str(before)


def test_every_pass_has_an_expectation() -> None:
    assert set(EXPECTED) == {p.__name__ for p in PASSES}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_what_is_left(name: str) -> None:
    run, module = modules()[name]
    after = run(module.example(), CUDA if name in ON_CUDA else CPU)
    ops: dict[str, int] = {}
    for node in after.fx.nodes:
        spec = op_of(node)
        if spec is not None:
            ops[spec.name] = ops.get(spec.name, 0) + 1
    assert ops == EXPECTED[name]
    if name == "straighten_experts":
        layouts = {spec.name: n.args[-3:] for n in after.fx.nodes if (spec := op_of(n)) is not None}
        assert layouts["grouped_linear"][-1] is False
        assert layouts["moe"] == (True, False, False)  # gated
    if name == "clean_views":
        assert count(after) == 4  # heads, silu, rows again, sum


def test_what_only_some_steps_want_is_written_too(tmp_path: Path) -> None:
    after = lower_further(gather_early_example(), CUDA, PROMPTS + MANY_ROWS, tmp_path)
    (file,) = tmp_path.iterdir()  # the second changes nothing
    assert file.name == f"{len(PIPELINE) + 1}_gather_early.txt"
    assert file.read_text() == f"{after}\n"


def regions(graph: Graph) -> list[fx.Node]:
    return [n for n in graph.fx.nodes if isinstance(n.target, Region)]


def test_rows_are_gathered_before_a_region() -> None:
    before = group_regions(gather_early_example(), CPU)
    after = gather_early(before, CPU)
    after.verify()
    assert [show(before.shape(n)[0]) for n in regions(before)] == ["T"], "the example has one that a gather comes after"
    computed = [n for n in after.fx.nodes if op_of(n) is not None and isinstance(n.meta["val"], torch.Tensor)] + regions(after)
    assert {show(after.shape(n)[0]) for n in computed} == {"R"}
    assert gather_early(after, CPU) is after


def test_a_region_of_several_results_is_taken_apart() -> None:
    def fn(x: torch.Tensor, rows: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        h = torch.tanh(torch.cumsum(x, 0) * 3)
        return [ingot.gather_rows(ingot.linear_add(ingot.linear(h, w, None) + 1, w, None, h / 2), rows)]

    ingot = torch.ops.ingot
    inputs = {"x": InputSpec(torch.float32, ("T", 8)), "rows": InputSpec(torch.int32, ("R",))}
    graph = from_function(fn, inputs, weights={"w": (torch.float32, (8, 8))})
    before = group_regions(graph, CPU)
    assert any(isinstance(n.meta["val"], tuple) for n in regions(before)), "one region makes h and its half"
    after = gather_early(before, CPU)
    after.verify()
    assert {show(after.shape(n)[0]) for n in regions(after) if isinstance(n.meta["val"], torch.Tensor)} == {"R"}
    given = values(graph, 13) | {"w": torch.randn(8, 8)}
    torch.testing.assert_close(after.run(given)[0], graph.run(given)[0])


def test_a_size_that_became_a_number_is_an_error() -> None:
    graph = from_function(lambda x: [x + 1], {"x": InputSpec(torch.float32, ("T", 3))})
    graph.verify()
    int(graph.placeholders["x"].meta["val"].shape[0])
    with pytest.raises(GraphError, match="input x: T is 7"):
        graph.verify()
