"""Admission of encoders: texts packed into one step, each must get the embedding that transformers' own model gives it alone."""

from __future__ import annotations

from itertools import accumulate

import torch
import transformers

from ingot.ops import Graph

_STEPS = ((9, 1, 23, 6), (2,), (17, 17))
"""Tokens of each sequence of a step."""
_POOLINGS = 3
_UNUSED = 3  # tokens after the last sequence, which belong to nobody


def compare(graph: Graph, reference: transformers.PreTrainedModel) -> float:
    """The largest error of an embedding's element, relative to the largest element, over steps and poolings; with the weights of `reference`."""
    generator = torch.Generator().manual_seed(2)
    tensors = reference.state_dict(keep_vars=True)
    fixed = {name: w.recipe.run(tensors, graph.constants).detach() for name, w in graph.weights.items()}
    vocab = int(reference.config.get_text_config().vocab_size)
    errors = []
    for lengths in _STEPS:
        texts = [torch.randint(5, vocab, (n,), generator=generator, dtype=torch.int32) for n in lengths]
        with torch.no_grad():
            hidden = [reference(input_ids=t[None].long()).last_hidden_state[0].float() for t in texts]
        for first in range(_POOLINGS):
            how = [(first + i) % _POOLINGS for i in range(len(texts))]
            inputs = {
                "input_ids": torch.cat([*texts, torch.full((_UNUSED,), 7, dtype=torch.int32)]),
                "positions": torch.cat([*(torch.arange(n, dtype=torch.int32) for n in lengths), torch.zeros(_UNUSED, dtype=torch.int32)]),
                "cu_seqlens_q": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
                "pooling": torch.tensor(how, dtype=torch.int32),
            }
            with torch.no_grad():
                (embeddings,), _ = graph.run({**fixed, **inputs})
            expected = torch.stack([(h.mean(0), h[0], h[-1])[p] for h, p in zip(hidden, how, strict=True)])
            errors.append(float((embeddings - expected).abs().max() / expected.abs().max()))
    # NaN compares as smaller than anything, and must not
    return max(errors) if all(e == e for e in errors) else float("inf")
