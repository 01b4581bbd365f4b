"""A decode step of a mixture of experts fits into a CUDA graph: nothing in it asks the host."""

import pytest
import torch

from ingot.compiler.outline import Outline
from ingot.compiler.pipeline import lower
from ingot.compiler.select import candidates, load_families
from ingot.models import tiny
from ingot.models.frontend import trace
from ingot.ops import OPS
from ingot.ops.graph import target_name
from ingot.ops.kernel import Steps
from ingot.ops.target import Target

TARGET = Target("cuda", "sm_90", "")
STEPS = [Steps(n, n, 1, n, True, 64) for n in (1, 4, 64)] + [Steps(1024, 64, 1024, 64, False, 64)]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_everything_has_a_kernel(model_type: str) -> None:
    load_families(TARGET)
    graph, _ = lower(trace(tiny.config(model_type), dtype=torch.bfloat16, page_size=64), TARGET)
    steps = Outline.of(graph).steps
    assert [target_name(s.node.target) for s in steps if s.call is None] == []
    for call in {repr(s.call): s.call for s in steps if s.call is not None and s.call.op in OPS}.values():
        assert all(candidates(call, s, TARGET) for s in STEPS), call.op
