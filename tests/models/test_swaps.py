"""Swaps take what equals the op and leave what does not; attention drops nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ingot.models import tiny
from ingot.models.frontend import TraceError, trace
from ingot.models.swaps import norm, patched, rope
from ingot.models.swaps.attention import paged
from ingot.models.swaps.context import Context, tracing
from ingot.models.swaps.masks import Mask
from ingot.ops import Graph
from ingot.ops.graph import target_name
from ingot.ops.rotary import STYLES


def targets(graph: Graph) -> list[str]:
    return [target_name(n.target) for n in graph.fx.nodes if n.op == "call_function"]


class WeightedNorm(torch.nn.Module):
    def __init__(self, offset: float = 0.0, eps_outside: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(24, device="meta"))
        self.eps, self.offset, self.eps_outside = 1e-5, offset, eps_outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        scale = 1 / (mean.sqrt() + self.eps) if self.eps_outside else torch.rsqrt(mean + self.eps)
        return x * scale * (self.weight + self.offset)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_matches_with_its_offset(offset: float) -> None:
    assert norm._match(WeightedNorm(offset), [(1, 5, 24)]) == norm._Plain(1e-5, offset)


def test_norm_that_adds_eps_elsewhere_stays() -> None:
    assert norm._match(WeightedNorm(eps_outside=True), [(1, 5, 24)]) is None


def test_norm_with_another_offset_stays() -> None:
    assert norm._match(WeightedNorm(0.5), [(1, 5, 24)]) is None


def test_layer_norm_stays() -> None:
    assert "aten.layer_norm" in targets(trace(tiny.config("starcoder2"), dtype=torch.float32))


def test_instances_of_one_class_are_told_apart() -> None:
    model = torch.nn.ModuleList([WeightedNorm(), WeightedNorm(0.5)])
    swap = norm.Norm(model, Context(16, None))
    x = torch.randn(1, 5, 24, device="meta")
    with patched(swap.observers()):
        [m(x) for m in model]
    real = [m.to_empty(device="cpu") for m in model]
    for m in real:
        torch.nn.init.normal_(m.weight)
    y = torch.randn(1, 5, 24)
    expected = [m(y) for m in real]
    with patched(swap.patches()):
        graphs = [torch.fx.experimental.proxy_tensor.make_fx(m)(y).graph for m in real]
        assert [any("ingot" in str(n.target) for n in g.nodes) for g in graphs] == [True, False]
        for m, e in zip(real, expected, strict=True):
            torch.testing.assert_close(m(y), e)
    assert "forward" in vars(WeightedNorm)
    assert not any("ingot" in str(n.target) for n in torch.fx.experimental.proxy_tensor.make_fx(real[0])(y).graph.nodes)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("heads", [1, 2])
def test_every_style_of_rotation_is_recognized(style: str, heads: int) -> None:
    def apply_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
        return tuple(rope._rotate(x, cos, sin, style, unsqueeze_dim) for x in (q, k))

    width = 6 if style.endswith("_half") else 12
    shapes = ((1, 4, 7, 16), (1, 2, 7, 16)) if heads == 1 else ((1, 7, 4, 16), (1, 7, 2, 16))
    assert rope._style(apply_rotary, {rope._Call(shapes, (1, 7, width), heads)}) == style


def test_a_rotation_the_other_way_stays() -> None:
    def apply_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return tuple(rope._rotate(x, cos, -sin, "neox", 1) for x in (q, k))

    assert rope._style(apply_rotary, {rope._Call(((1, 4, 7, 16), (1, 2, 7, 16)), (1, 7, 16), 1)}) is None


def test_tables_scaled_by_length_bands_are_plain() -> None:
    """Llama 3's frequencies are changed once, so the tables are still positions × frequencies."""
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    graph = trace(tiny.config("llama", rope_parameters=scaling), dtype=torch.float32)
    assert "ingot.rotary_embedding" in targets(graph)
    plain = trace(tiny.config("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), dtype=torch.float32)
    name = "model.rotary_emb.inv_freq"
    assert not torch.allclose(graph.constants[name], plain.constants[name])


def test_yarn_scales_the_tables() -> None:
    graph = trace(tiny.config("gpt_oss"), dtype=torch.float32)
    (table,) = (n for n in graph.fx.nodes if n.target is torch.ops.ingot.rotary_embedding.default)
    assert table.args[2] == pytest.approx(1.3466, abs=1e-3)
    assert table.args[3] is True


def test_tables_that_depend_on_the_length_are_refused() -> None:
    config = tiny.config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(TraceError, match=r"LlamaRotaryEmbedding: .*length"):
        trace(config, dtype=torch.float32)


def attend(**arguments: Any) -> Any:
    module = SimpleNamespace(is_causal=arguments.pop("module_is_causal", True))
    given = {"attention_mask": Mask(), **arguments}
    q, k, v = (torch.empty(1, h, 5, 16, device="meta") for h in (4, 2, 2))
    context = Context(16, None)
    with tracing(context):
        paged(module, q, k, v, **given)  # type: ignore[arg-type]
    return context.states


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"attention_bias": torch.zeros(5, 5)}, "attention_bias"),
        ({"indices": torch.zeros(5)}, "indices"),
        ({"block_size": 64}, "block_size"),
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, "attention_mask as a Tensor"),
        ({"attention_mask": None, "module_is_causal": False}, "not causal"),
        ({"attention_mask": Mask(window=8), "sliding_window": 9}, "sliding_window=9, its mask has 8"),
    ],
)
def test_attention_drops_no_argument(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(TraceError, match=f"SimpleNamespace: .*{named}"):
        attend(**arguments)


def test_attention_groups_its_caches_by_window() -> None:
    assert {s.group for s in attend().values()} == {"full"}
    assert {s.group for s in attend(attention_mask=Mask(window=8), sliding_window=8).values()} == {"window8"}
    assert {s.group for s in attend(attention_mask=None).values()} == {"full"}


def test_experts_with_a_known_gate_are_one_op_and_others_keep_their_gate() -> None:
    mixtral, gpt_oss, hy = (targets(trace(tiny.config(m), dtype=torch.float32)) for m in ("mixtral", "gpt_oss", "hy_v4"))
    for known in (mixtral, gpt_oss):
        assert "ingot.moe" in known
        assert "ingot.grouped_linear" not in known
    assert "ingot.moe" not in hy
    assert hy.count("ingot.grouped_linear") == 2


def test_states_of_mamba2() -> None:
    graph = trace(tiny.config("mamba2"), dtype=torch.bfloat16)
    assert {n: (s.group, s.kind, s.dtype, s.shape) for n, s in graph.states.items()} == {
        f"{kind}_state_{i}": ("slot", "slot", dtype, shape)
        for i in range(2)
        for kind, dtype, shape in (("conv", torch.bfloat16, (160, 3)), ("ssm", torch.float32, (8, 16, 8)))
    }
    assert "state_slots" in graph.inputs
    assert "ingot.rms_norm_gated" in targets(graph)


def test_patches_are_undone() -> None:
    from transformers.models.qwen3 import modeling_qwen3

    before = dict(vars(modeling_qwen3)), modeling_qwen3.Qwen3RMSNorm.forward, torch.nn.functional.linear
    trace(tiny.config("qwen3"), dtype=torch.float32)
    assert (dict(vars(modeling_qwen3)), modeling_qwen3.Qwen3RMSNorm.forward, torch.nn.functional.linear) == before
