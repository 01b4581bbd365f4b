"""Library calls against the references of the ops that they claim."""

import pytest
import torch

from ingot.artifacts import gate
from ingot.ops import OPS
from ingot.ops.kernel import Call, Steps, Tensor
from ingot.ops.library import CALLS, linear_add
from ingot.ops.target import Target


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [0, 1, 7, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "e", "f"), [(4, 4, 32, 32), (6, 2, 24, 40)])
def test_packed_attention(heads: int, kv_heads: int, e: int, f: int, window: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    starts = torch.tensor([0, 19, 19, 20, 83], dtype=torch.int32)
    q, k, v = (torch.randn(90, h, d).to(dtype) for h, d in ((heads, e), (kv_heads, e), (kv_heads, f)))
    out = torch.full((90, heads, f), float("nan"), dtype=dtype)
    CALLS["packed_attention"](out, q, k, v, starts, 0.3, window)
    expected = OPS["packed_attention"].reference(q.float(), k.float(), v.float(), starts, 0.3, window)
    assert float((out.float() - expected).norm() / expected.norm()) < tolerance
    assert not out[83:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_may_lie_where_its_residual_is(dtype: torch.dtype) -> None:
    """Timed so, and compared with the reference beside it: there a run must not change what the next one reads."""
    x, residual = Tensor(dtype, ({"T": 1}, 64)), Tensor(dtype, ({"T": 1}, 48))
    call = Call("linear_add", {"x": x, "weight": Tensor(dtype, (48, 64)), "bias": Tensor(dtype, (48,)), "residual": residual}, (residual,))
    steps = Steps(32, 4, 32, 4, False)
    (candidate,) = linear_add(call, steps, Target("cpu", "x86-64:avx2+fma", ""))
    assert candidate.inplace == "residual"
    trial = gate.Trials(torch.device("cpu")).of(call, steps)
    assert max(trial.error(candidate, [None, None]) for _ in range(2)) < gate.tolerance(call)
    inputs, sizes = gate.arguments(call, steps, torch.device("cpu"), 32, seed=0)
    before = inputs["residual"].clone()
    (apart,), run = gate.bind(candidate, call, inputs, sizes, [None, None])
    run()
    assert torch.equal(inputs["residual"], before)
    (inplace,), run = gate.bind(candidate, call, inputs, sizes, [None, None], inplace=True)
    run()
    assert inplace is inputs["residual"]
    torch.testing.assert_close(inplace, apart)
