"""CPU kernel families: TVMScript for the loops, LLVM functions (`vector.py`) for what one instruction set does best."""

from importlib import import_module

FAMILIES = ("attention", "embedding", "glu", "kv_cache", "latent_attention", "linear", "linear_attention", "moe", "norm", "pooling", "quantized_linear",
            "quantized_moe", "rotary", "routing", "state_space")  # fmt: skip


def load() -> None:
    """Import every family, so that its claims are registered. Needs no TVM: families write source text."""
    for family in FAMILIES:
        import_module(f"{__name__}.{family}")
