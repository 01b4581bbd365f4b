"""Library calls against the references of the ops that they claim."""

import pytest
import torch

from ingot.ops import OPS
from ingot.ops.library import CALLS


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
