"""Dummy weights: random values from a seed, for measuring a model whose checkpoint nobody wants to download."""

from __future__ import annotations

import torch


def generate(seed: int, mean: float, std: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Normal values of `shape`, or for an integer dtype any of its values alike, drawn on `device`: the same for a seed on every machine
    with that kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max + 1, shape, dtype=dtype, device=device, generator=generator)
    if dtype.itemsize == 1:  # torch draws no 8-bit floats
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(mean, std, generator=generator).to(dtype)
    return torch.empty(shape, dtype=dtype, device=device).normal_(mean, std, generator=generator)
