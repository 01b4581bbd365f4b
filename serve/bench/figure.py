"""How a figure is told: beside its floor, with what it was measured on."""

from __future__ import annotations

from typing import Any

from ingot.artifacts.artifact import Artifact

from .floor import Floor


def about(artifact: Artifact, floor: Floor) -> dict[str, Any]:
    """What was measured, and what the floors are made of."""
    manifest = artifact.manifest
    return {
        "model": manifest.model.name,
        "target": str(manifest.target),
        "dtype": manifest.options.dtype,
        "quantize": manifest.options.quantize,
        "bandwidth_gb_per_s": floor.rates.bandwidth / 1e9,
        "tflop_per_s": floor.rates.flops / 1e12,
        "tflop_per_s_of_codes": {kind: rate / 1e12 for kind, rate in floor.rates.codes.items()},
        "rates": floor.rates.source,
        "weight_bytes_per_step": floor.weight_bytes,
        "kv_bytes_per_token": sum(a.nbytes for a in floor.attention),
    }


def beside(seconds: float, floor: float) -> dict[str, float]:
    """Milliseconds, the floor's, and the fraction of what is possible that was reached."""
    return {"ms": seconds * 1e3, "floor_ms": floor * 1e3, "fraction_of_floor": floor / seconds}
