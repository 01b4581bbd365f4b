"""Kernel families in Triton, one file each: jitted functions, and the claim that says when and with which tiles to use them."""

from __future__ import annotations

import importlib

FAMILIES = (
    "attention",
    "causal_attention",
    "warpgroup_attention",
    "decode_attention",
    "embedding",
    "glu",
    "head_linear",
    "kv_cache",
    "latent_attention",
    "latent_write",
    "linear",
    "linear_attention",
    "moe",
    "norm",
    "norm_gated",
    "packed_attention",
    "pooling",
    "quantized_linear",
    "quantized_moe",
    "rotary",
    "routing",
    "sampling",
    "sparse_index",
    "state_space",
)


def load() -> None:
    """Register every family. Imports Triton."""
    for family in FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
