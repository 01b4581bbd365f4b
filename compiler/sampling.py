"""The entry point `sample`: logits to tokens, apart from `forward`, because what a request forbids is known only between the two."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from ingot.ops import Graph, InputSpec

from .call import dtype_name
from .from_function import from_function
from .variants import MAX_PROMPT_ROWS, VariantSpec, rows_variant


@functools.cache  # a compile asks twice: it foresees kernels
def sampling_programs(vocab_size: int, dtype: torch.dtype, max_num_seqs: int) -> list[tuple[Graph, list[VariantSpec]]]:
    """A graph for the model's logits of type `dtype`, and one for processed logits, which are float32; each with its only variant."""
    rows = max(max_num_seqs, MAX_PROMPT_ROWS)
    return [(_graph(vocab_size, d), [rows_variant(f"sample_{dtype_name(d)}", rows)]) for d in dict.fromkeys((dtype, torch.float32))]


def _graph(vocab_size: int, dtype: torch.dtype) -> Graph:
    f32, i32 = torch.float32, torch.int32
    inputs = {
        "logits": InputSpec(dtype, ("R", vocab_size)),
        "temperature": InputSpec(f32, ("R",)),
        "top_k": InputSpec(i32, ("R",)),
        "top_p": InputSpec(f32, ("R",)),
        "min_p": InputSpec(f32, ("R",)),
        "seed": InputSpec(i32, ("R", 2)),
        "step": InputSpec(i32, ("R",)),
    }
    return replace(from_function(lambda **given: [torch.ops.ingot.sample(*given.values())], inputs), entry_point="sample")
