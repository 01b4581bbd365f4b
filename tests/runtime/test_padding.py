"""Which size a step is computed at, and what of a plan is the same for all steps of that size."""

import pytest

from ingot.artifacts.plan import Arg, Entry, Grid, Value, Variant
from ingot.compiler.variants import VariantSpec, variants
from ingot.ops.target import Target
from ingot.runtime.batch import StepLayout, StepSize
from ingot.runtime.padding import captured_sizes, padded


def variant(spec: VariantSpec) -> Variant:
    steps = spec.steps
    return Variant("forward", spec.name, steps.max_tokens, steps.max_seqs, steps.max_num_new, steps.max_rows, spec.capture, (), (), (), 0)


GPU = [variant(s) for s in variants(Target("cuda", "sm_90", ""), 256, 8192, False)]
DECODE = [v for v in GPU if v.decodes]
PROMPTS = [v for v in GPU if not v.decodes]


def test_decode_steps_are_padded_in_all_sizes():
    assert [v.capture for v in DECODE] == [(v.max_tokens,) for v in DECODE]
    for n, bucket in [(1, 1), (3, 4), (17, 32), (33, 64), (200, 224), (256, 256)]:
        taken = next(v for v in DECODE if v.max_tokens >= n)
        assert padded(StepSize(n, n, n - 1, 512), taken) == StepSize(bucket, bucket, bucket, 512)


@pytest.mark.parametrize("tokens", range(1, 8193, 61))
def test_steps_with_prompts_are_padded_to_few_sizes(tokens):
    taken = next(v for v in PROMPTS if v.max_tokens >= tokens)
    for seqs, rows, row_bucket in [(1, 0, 0), (1, 1, 1), (min(tokens, 256), 3, 4), (min(tokens, 256), 33, 64), (1, 500, 512)]:
        if rows > min(taken.max_rows, tokens):
            continue
        size = StepSize(tokens, seqs, rows, 1024)
        found = padded(size, taken)
        assert tokens <= found.num_tokens <= min(taken.max_tokens, max(16, tokens * 3 // 2 + 1))
        assert found.num_tokens in taken.capture or (tokens > 1024 and found.num_tokens < tokens * (1 + 1 / 15))
        assert seqs <= found.num_seqs == min(found.num_tokens, 8 if seqs <= 8 else 256)
        assert found.num_tokens > 1024 or found._replace(num_rows=1, longest=0) in captured_sizes(taken)
        assert (found.num_rows, found.longest) == (min(row_bucket, taken.max_rows), 1024)


def test_the_sizes_are_few():
    captured = [t for v in PROMPTS for t in v.capture]
    assert captured == sorted(set(captured))
    assert len(captured) <= 20
    assert captured[-1] == 1024
    assert sum(len(captured_sizes(v)) for v in PROMPTS) <= 40
    assert all(len(captured_sizes(v)) == 1 for v in DECODE)
    assert len({padded(StepSize(t, 1, 1, 0), PROMPTS[-1]).num_tokens for t in range(1025, 8193)}) <= 48


def test_what_a_graph_reads_does_not_move_with_the_rows():
    layout = StepLayout((("full", 64, 40),), slots=True, num_samples=64)
    few, many = layout.fields(StepSize(128, 64, 1, 1024)), layout.fields(StepSize(128, 64, 300, 1024))
    for name in ("token_ids", "token_sources", "positions", "slot_mapping_full", "cu_seqlens_q", "seq_lens", "state_slots", "logits_rows"):
        assert few[name].offset == many[name].offset


def test_a_cpu_pads_and_captures_nothing():
    assert not any(s.capture for s in variants(Target("cpu", "x86-64:", ""), 64, 512, False))


def test_entries_before_the_first_that_depends_on_the_rows():
    def value(name: str, *shape: object) -> Value:
        return Value(name, "float32", shape, "arena")  # type: ignore[arg-type]

    def entry(*names: str, **how: object) -> Entry:
        return Entry(names[-1], "aten.mul.Tensor", "torch", tuple(Arg(value=n) for n in names[:-1]), (names[-1],), **how)  # type: ignore[arg-type]

    values = (value("x", {"T": 1}, 8), value("y", {"T": 2, "": 1}, 8), value("rows", {"R": 1}), value("z", {"R": 1}, 8))
    head = (entry("x", "y"), entry("y", "x"))
    for tail in (entry("x", "rows", "z"), entry("x", "y", grid=(Grid({"R": 1}, 16),)), entry("x", "y", kwargs={"n": Arg(items=(Arg(dim={"R": 1}),))})):
        assert Variant("forward", "v", 8, 8, 8, 8, (8,), values, (*head, tail, head[0]), ("z",), 0).num_before_rows() == 2
    assert Variant("forward", "v", 8, 8, 8, 8, (8,), values, head, ("x",), 0).num_before_rows() == 2
