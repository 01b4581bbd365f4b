"""Values with a common scale per row, in eight bits: what a quantized KV cache holds."""

from __future__ import annotations

import torch

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The dtypes that rows are quantized to, with their largest value (e4m3: OCP 8-bit floating point specification 1.0; int8: symmetric)."""


def quantize(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] → (values [..., D] of `dtype`, float32 scales [...]) with values · scale ≈ x, rounded to nearest even.

    The scale is max |x| / LARGEST[dtype] of each row (0 for a row of zeros), or the given one, broadcast to [...]; values beyond saturate.
    """
    h = x.float()
    largest = LARGEST[dtype]
    scales = h.abs().amax(-1) / largest if scale is None else scale.float().expand(x.shape[:-1])
    values = (h * (1 / scales).nan_to_num(posinf=0.0).unsqueeze(-1)).clamp(-largest, largest)
    return (values if dtype.is_floating_point else values.round()).to(dtype), scales
