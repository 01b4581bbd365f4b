"""StepBatch: what is packed, where it lies, and that nothing is lost on the way."""

import numpy as np
import pytest

from ingot.runtime.batch import SAMPLING, StepBatch, StepLayout, pack, sampling_record
from ingot.runtime.kv_cache import GroupInfo, KVCache
from ingot.runtime.request import Request, SamplingParams, Sequence, TokenLogprob
from ingot.runtime.scheduler import Scheduled

LAYOUT = StepLayout((("full", 7), ("window8", 13)), slots=True)


def random_batch(T: int, S: int, R: int, seed: int = 0) -> StepBatch:
    batch = StepBatch(LAYOUT, T, S, R)
    rng = np.random.default_rng(seed)
    for array in batch.arrays.values():
        array[...] = rng.integers(1, 1000, array.shape)
    batch.arrays["cu_seqlens_q"][:] = [0, *np.sort(rng.integers(1, T, S - 1)), T]
    return batch


def test_arrays_are_aligned_disjoint_views_of_one_buffer():
    batch = random_batch(11, 3, 5)
    expected = {"input_ids": (11,), "positions": (11,), "cu_seqlens_q": (4,), "seq_lens": (3,), "logits_rows": (5,), "state_slots": (3,),
                "slot_mapping_full": (11,), "slot_mapping_window8": (11,), "page_table_full": (3, 7), "page_table_window8": (3, 13),
                "temperature": (5,), "top_k": (5,), "top_p": (5,), "min_p": (5,), "seed": (5, 2), "num_logprobs": (5,), "target": (5,),
                "step": (5,)}  # fmt: skip
    assert {name: f.shape for name, f in batch.fields.items()} == expected
    assert {name for name, f in batch.fields.items() if f.dtype == "float32"} == {"temperature", "top_p", "min_p"}
    used = np.zeros(len(batch.buffer), int)
    for name, field in batch.fields.items():
        assert field.offset % 16 == 0
        assert np.shares_memory(batch.arrays[name], batch.buffer)
        used[field.offset : field.offset + batch.arrays[name].size] += 1
    assert used.max() == 1
    assert len(batch.buffer) == LAYOUT.size(11, 3, 5)


def test_bytes_round_trip():
    batch = random_batch(19, 4, 6)
    copy = StepBatch.from_bytes(LAYOUT, batch.to_bytes())
    assert (copy.num_tokens, copy.num_seqs, copy.num_rows) == (19, 4, 6)
    for name, array in batch.arrays.items():
        np.testing.assert_array_equal(copy.arrays[name], array)
        assert copy.arrays[name].dtype == array.dtype
    assert copy.max_num_new == int(np.diff(batch.arrays["cu_seqlens_q"]).max())


@pytest.mark.parametrize("size", [(19, 4, 6), (24, 9, 8), (32, 4, 6), (20, 9, 16)])
def test_padding_has_no_effect(size):
    batch = random_batch(19, 4, 6)
    T, S, R = size
    padded = batch.pad_to(T, S, R)
    for name, array in batch.arrays.items():
        np.testing.assert_array_equal(padded.arrays[name][: len(array)], array)
    a = padded.arrays
    for name in ("input_ids", "positions"):
        assert not a[name][19:].any()
    for name in ("slot_mapping_full", "slot_mapping_window8"):
        assert (a[name][19:] == -1).all()
    assert (a["state_slots"][4:] == -1).all()
    assert not a["seq_lens"][4:].any()
    assert a["cu_seqlens_q"][4:].tolist() == [min(19 + i, T) for i in range(S - 4 + 1)]
    assert not a["temperature"][6:].any()
    assert (a["num_logprobs"][6:] == -1).all()
    assert (a["target"][6:] == -1).all()
    with pytest.raises(ValueError, match=r"a step of 19 tokens, 4 sequences and 6 rows does not fit in 19, 3 and 6"):
        batch.pad_to(19, 3, 6)


def test_a_sampling_record_is_one_row():
    row = np.frombuffer(sampling_record(SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, logprobs=3), 2**40 + 5), SAMPLING)[0]
    assert row.tolist()[:4] == (0.5, 7, 0.25, 0.125)
    assert row["seed"].view(np.int64) == 2**40 + 5
    assert (row["num_logprobs"], row["target"], row["step"]) == (3, -1, 0)
    greedy = np.frombuffer(sampling_record(SamplingParams(temperature=1e-7, top_k=-1), 2**64 - 1), SAMPLING)[0]
    assert (greedy["temperature"], greedy["top_k"], greedy["num_logprobs"], greedy["seed"].tolist()) == (0, 0, -1, [-1, -1])


def test_pack_by_hand():
    cache = KVCache({"full": GroupInfo("page", 4, 32), "window8": GroupInfo("page", 2, 32), "slot": GroupInfo("slot", 0, 5)}, 5, 28)
    layout = StepLayout.of(cache)
    assert layout == StepLayout((("full", 7), ("window8", 14)), True)

    def make(tokens: list[int], num_prompt: int, computed: int, to: int, **params: object) -> Sequence:
        sampling = SamplingParams(seed=1, **params)
        seq = Sequence(Request("r", tokens[:num_prompt], sampling), 0, (0,), 16, tokens, sampling_record(sampling, 9))
        assert cache.admit(seq)
        assert cache.grow(seq, to)
        cache.commit(seq, computed)
        return seq

    decode = make([11, 12, 13, 14, 15, 16], 4, 5, 6, temperature=0.5)
    chunk = make(list(range(20, 30)), 10, 3, 7)
    scored = make([41, 42, 43, 44, 45], 5, 1, 5, temperature=0, prompt_logprobs=2, logprobs=1)
    scored.add_prompt_logprob(TokenLogprob(42, -1.0))
    scored.add_prompt_logprob(TokenLogprob(43, -1.0))  # as after a preemption: computed again, not wanted again
    cache.page_tables["full"][decode.row, :2] = [9, 4]
    cache.page_tables["window8"][decode.row, :3] = [7, 8, 30]
    a = pack([Scheduled(decode, 1), Scheduled(chunk, 4), Scheduled(scored, 4)], cache, layout).arrays
    assert a["input_ids"].tolist() == [16, 23, 24, 25, 26, 42, 43, 44, 45]
    assert a["positions"].tolist() == [5, 3, 4, 5, 6, 1, 2, 3, 4]
    assert a["cu_seqlens_q"].tolist() == [0, 1, 5, 9]
    assert a["seq_lens"].tolist() == [6, 7, 5]
    assert a["state_slots"].tolist() == [decode.row, chunk.row, scored.row]
    assert a["slot_mapping_full"][0] == 4 * 4 + 1
    assert a["slot_mapping_window8"][0] == 30 * 2 + 1
    for name, size in (("full", 4), ("window8", 2)):
        tables = cache.page_tables[name][[decode.row, chunk.row, scored.row]]
        used = -(-7 // size)
        np.testing.assert_array_equal(a[f"page_table_{name}"][:, :used], tables[:, :used])
        expected = [tables[s, p // size] * size + p % size for s, p in zip([0, 1, 1, 1, 1, 2, 2, 2, 2], a["positions"], strict=True)]
        assert a[f"slot_mapping_{name}"].tolist() == expected
    # two sample (the chunk does not reach its end), then prompt rows: positions 2 and 3 of the last sequence
    assert a["logits_rows"].tolist() == [0, 8, 6, 7]
    assert a["target"].tolist() == [-1, -1, 44, 45]
    assert a["num_logprobs"].tolist() == [-1, 1, 2, 2]
    assert a["temperature"].tolist() == [0.5, 0, 0, 0]
    assert a["step"].tolist() == [2, 0, 0, 0]
    assert a["seed"].tolist() == [[9, 0], [9, 0], [0, 0], [0, 0]]
