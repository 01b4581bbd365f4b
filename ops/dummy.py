"""Dummy weights: random values from a seed, for measuring a model whose checkpoint nobody wants to download."""

from __future__ import annotations

import torch


def generate(seed: int, mean: float, std: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Normal values of `shape`, drawn on `device`: the same for a seed on every machine with that kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=device).normal_(mean, std, generator=generator)
