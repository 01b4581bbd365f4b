"""Latent attention against attention over keys and values that are made; sparse attention against a mask."""

from __future__ import annotations

import pytest
import torch

from ingot.ops import OPS

HEADS, NOPE, WIDTH, RANK, ROPE, PAGE = 5, 6, 7, 12, 4, 4
CACHED, NEW = (3, 0, 9), (2, 5, 1)  # cached and new tokens of three sequences


def batch() -> dict[str, torch.Tensor]:
    lens = [c + n for c, n in zip(CACHED, NEW, strict=True)]
    pages = torch.randperm(9, generator=torch.Generator().manual_seed(0)).view(3, 3)
    starts = [0, *torch.tensor(NEW).cumsum(0).tolist()]
    i32 = {"cu_seqlens_q": [*starts, starts[-1] + 1], "seq_lens": [*lens, 0]}  # the last row is padding, over one token
    tensors = {n: torch.tensor(v, dtype=torch.int32) for n, v in i32.items()}
    return {**tensors, "page_table": torch.cat([pages, torch.zeros(1, 3, dtype=torch.long)]).int()}


def slots(table: torch.Tensor, begins: tuple[int, ...], counts: tuple[int, ...], padding: int) -> torch.Tensor:
    made = [int(table[s, p // PAGE]) * PAGE + p % PAGE for s, (b, n) in enumerate(zip(begins, counts, strict=True)) for p in range(b, b + n)]
    return torch.tensor(made + [-1] * padding, dtype=torch.int32)


@pytest.fixture
def drawn() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    total = sum(NEW) + 1
    step = batch()
    cache = torch.full((10, 1, PAGE, RANK + ROPE), float("nan"))
    everything = [randn(c + n, RANK + ROPE) for c, n in zip(CACHED, NEW, strict=True)]
    write = OPS["latent_write"].reference
    past = torch.cat([e[:c] for e, c in zip(everything, CACHED, strict=True)])
    write(past[:, :RANK], past[:, RANK:], cache, slots(step["page_table"], (0, 0, 0), CACHED, 0))
    new = torch.cat([*(e[c:] for e, c in zip(everything, CACHED, strict=True)), randn(1, RANK + ROPE)])
    write(new[:, :RANK], new[:, RANK:], cache, slots(step["page_table"], CACHED, NEW, 1))
    return {**step, "cache": cache, "q": randn(total, HEADS, NOPE + ROPE), "up": randn(HEADS, NOPE + WIDTH, RANK), "sinks": randn(HEADS),
            **{f"tokens_{i}": e for i, e in enumerate(everything)}}  # fmt: skip


def latent(d: dict[str, torch.Tensor], indices: torch.Tensor | None = None, sinks: torch.Tensor | None = None, window: int = 0) -> torch.Tensor:
    head_linear = OPS["head_linear"].reference
    q_latent = head_linear(d["q"][..., :NOPE], d["up"][:, :NOPE].transpose(1, 2))
    out = OPS["mla_attention"].reference(
        q_latent, d["q"][..., NOPE:], d["cache"], d["cu_seqlens_q"], d["seq_lens"], d["page_table"], indices, sinks, 0.3, window
    )
    return head_linear(out, d["up"][:, NOPE:])


def expanded(d: dict[str, torch.Tensor], chosen: torch.Tensor | None = None, sinks: torch.Tensor | None = None, window: int = 0) -> torch.Tensor:
    """Keys and values of each head, made of the latents, under a mask; the padding row is zero."""
    out = torch.zeros(sum(NEW) + 1, HEADS, WIDTH)
    begin = 0
    for s, (cached, new) in enumerate(zip(CACHED, NEW, strict=True)):
        tokens = d[f"tokens_{s}"]
        both = torch.einsum("kl,hol->hko", tokens[:, :RANK], d["up"])
        k = torch.cat([both[..., :NOPE], tokens[None, :, RANK:].expand(HEADS, -1, -1)], -1)
        for t in range(new):
            position = cached + t
            seen = torch.arange(len(tokens)) <= position
            if window:
                seen &= torch.arange(len(tokens)) > position - window
            if chosen is not None:
                seen &= torch.isin(torch.arange(len(tokens)), chosen[begin + t].long())
            scores = (torch.einsum("he,hke->hk", d["q"][begin + t], k) * 0.3).masked_fill(~seen, float("-inf"))
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None]], -1)
            out[begin + t] = torch.einsum("hk,hkf->hf", scores.softmax(-1)[:, : len(tokens)], both[..., NOPE:])
        begin += new
    return out


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_absorbed_equals_expanded(drawn: dict[str, torch.Tensor], window: int, with_sinks: bool) -> None:
    sinks = drawn["sinks"] if with_sinks else None
    torch.testing.assert_close(latent(drawn, sinks=sinks, window=window), expanded(drawn, sinks=sinks, window=window), rtol=1e-4, atol=1e-5)


def test_only_chosen_positions_are_seen(drawn: dict[str, torch.Tensor]) -> None:
    indices = torch.tensor([[3, 0], [-1, 4], [0, -1], [1, 0], [0, 2], [3, 1], [2, 4], [9, 5], [-1, -1]], dtype=torch.int32)
    torch.testing.assert_close(latent(drawn, indices=indices), expanded(drawn, chosen=indices), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("topk", [1, 3, 16])
def test_sparse_index_chooses_the_best_of_the_past(topk: int) -> None:
    generator = torch.Generator().manual_seed(2)
    step, joints, dim = batch(), 8, 6
    keys = [torch.randn(c + n, dim, generator=generator) for c, n in zip(CACHED, NEW, strict=True)]
    cache = torch.full((10, 1, PAGE, dim), float("nan"))
    OPS["latent_write"].reference(torch.cat(keys), None, cache, slots(step["page_table"], (0, 0, 0), tuple(len(k) for k in keys), 0))
    q, weights = torch.randn(sum(NEW) + 1, joints, dim, generator=generator), torch.randn(sum(NEW) + 1, joints, generator=generator)
    chosen = OPS["sparse_index"].reference(q, weights, cache, step["cu_seqlens_q"], step["seq_lens"], step["page_table"], topk, 0.5)
    assert chosen.dtype == torch.int32
    assert (chosen[-1] == -1).all()
    row = 0
    for k, cached, new in zip(keys, CACHED, NEW, strict=True):
        for position in range(cached, cached + new):
            scores = (weights[row, :, None] * torch.relu(0.5 * q[row] @ k[: position + 1].t())).sum(0)
            expected = set(scores.topk(min(topk, position + 1)).indices.tolist())
            assert set(chosen[row][chosen[row] >= 0].tolist()) == expected
            row += 1
