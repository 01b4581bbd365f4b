"""Every quantization format: what its parts mean, that layouts lose nothing, and that rows can be cut and joined."""

import pytest
import torch

from ingot.ops import formats, quantized
from ingot.ops.formats import FormatError, get
from ingot.ops.formats.format import joined
from ingot.ops.glu import glu
from ingot.ops.target import Target

CPU, CUDA = Target("cpu", "x86-64:avx2+fma", ""), Target("cuda", "sm_90", "")
SHAPES = [(16, 128), (48, 300), (37, 75), (5, 300), (130, 257)]
STEPS = {"int4": 15, "int8": 255}
"""How many steps lie between the ends of an integer format's range."""


def weight(n: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(n * k)
    w = torch.randn(n, k) * k**-0.5
    w[n // 2] = 0.0
    return w.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_to_nearest(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = weight(*shape, dtype)
    form = get(name)
    parts = form.quantize(w)
    assert tuple(parts) == form.parts
    error = (form.dequantize(parts) - w.float()).abs()
    if name.startswith("fp8"):
        assert (error <= w.float().abs() / 16 + w.float().abs().max() / 448 / 512).all()  # three bits of mantissa, and subnormal codes
    else:
        scale = form.columns(parts["scale"], shape[1])
        at_ends = 1.02 if name.endswith("_zero") else 1.0  # the zero is rounded too: an end of the range may be cut by half a step
        assert (
            error <= scale * (0.5 * at_ends + 0.02 * STEPS[name[:4]] * (dtype == torch.bfloat16)) + (1e-7 if not name.endswith("_zero") else 0.5 * scale)
        ).all()
    assert (form.dequantize(parts)[shape[0] // 2] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("experts", [False, True], ids=["linear", "experts"])
@pytest.mark.parametrize("target", [CPU, CUDA], ids=["cpu", "cuda"])
def test_a_layout_loses_nothing(name: str, shape: tuple[int, int], target: Target, experts: bool) -> None:
    form = get(name)
    parts, layout = form.quantize(weight(*shape)), form.layout(target, experts)
    packed = form.pack(parts, layout)
    meta = form.pack(form.quantize(torch.empty(shape, device="meta")), layout)
    assert {n: (p.shape, p.dtype) for n, p in packed.items()} == {n: (p.shape, p.dtype) for n, p in meta.items()}
    back = form.unpack(packed, layout, *shape)
    assert all(torch.equal(back[n].float(), parts[n].float()) for n in form.parts)


@pytest.mark.parametrize("name", formats.names())
def test_rows_can_be_joined(name: str) -> None:
    form = get(name)
    above, below = weight(2 * form.rows, 75), weight(37, 75) * 3
    whole = form.quantize(torch.cat([above, below]))
    pieces = joined([form.quantize(above), form.quantize(below)])
    assert all(torch.equal(whole[n].float(), pieces[n].float()) for n in form.parts)


@pytest.mark.parametrize("name", formats.names())
def test_random_parts_make_a_weight_of_the_usual_size(name: str) -> None:
    from ingot.ops.kernel import Call, Steps, Tensor
    from ingot.ops.random_inputs import random_inputs

    form = get(name)
    plain = form.quantize(torch.empty(256, 512, device="meta"))
    args = {"x": Tensor(torch.float32, ({"T": 1}, 512))} | {n: Tensor(p.dtype, tuple(p.shape)) for n, p in plain.items()} | {"format": name}
    made = random_inputs(Call("quantized_linear", args, ()), Steps(4, 4, 4, 4, False), {"T": 4, "S": 1, "R": 1}, "cpu", 0)
    codes = {n: made[n] & 15 if name.startswith("int4") and n == "weight" else made[n] for n in form.parts}
    assert 0.7 < float(form.dequantize(codes).std()) * 512**0.5 < 1.4


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("target", [CPU, CUDA], ids=["cpu", "cuda"])
def test_the_op_is_dequantize_and_a_product(name: str, target: Target) -> None:
    form, n, k = get(name), 2 * 128, 75
    w, x, bias, residual = weight(n, k), torch.randn(3, k), torch.randn(n), torch.randn(3, n)
    parts = form.quantize(w)
    layout, meaning = form.layout(target), form.dequantize(parts)

    def call(pieces: int, bias: torch.Tensor | None, residual: torch.Tensor | None, act: str | None, activation: str) -> torch.Tensor:
        packed = {"zero": None} | formats.packed(parts, name, layout, pieces)
        return torch.ops.ingot.quantized_linear(x, packed["weight"], packed["scale"], packed["zero"], None, bias, residual, act, name, layout, activation, n)

    torch.testing.assert_close(call(1, bias, residual, None, "none"), x @ meaning.T + bias + residual)
    torch.testing.assert_close(call(2, None, None, "silu", "none"), glu(x @ meaning.T, "silu"))
    rounded = quantized.round_activation(x, "int8_group32", None)
    torch.testing.assert_close(call(1, None, None, None, "int8_group32"), rounded @ meaning.T)


@pytest.mark.parametrize(("activation", "group", "steps"), [("int8_token", 75, 254), ("int8_group32", 32, 254), ("fp8_e4m3_token", 75, 0)])
def test_activations_are_rounded_to_nearest(activation: str, group: int, steps: int) -> None:
    x = torch.randn(5, 75)
    x[2] = 0.0
    error = (quantized.round_activation(x, activation, None) - x).abs()
    for begin in range(0, 75, group):
        piece = slice(begin, begin + group)
        largest = x[:, piece].abs().amax(1, keepdim=True)
        bound = largest / steps * 1.001 if steps else x[:, piece].abs() / 16 + largest / 448 / 512
        assert (error[:, piece] <= bound + 1e-7).all()


def test_a_given_scale_saturates() -> None:
    scale = torch.tensor([0.01])
    rounded = quantized.round_activation(torch.tensor([[1.0, 100.0, -100.0]]), "fp8_e4m3_static", scale)
    torch.testing.assert_close(rounded, torch.tensor([[0.96, 4.48, -4.48]]), atol=0.05, rtol=0)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(FormatError, match=r"'int5'.*int4_group128"):
        get("int5")
    with pytest.raises(FormatError, match="none, fp8, int8, int4-g32"):
        formats.online("int5", CPU)
