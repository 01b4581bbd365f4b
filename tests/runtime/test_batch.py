"""StepBatch: what is packed, where it lies, and that nothing is lost on the way."""

from array import array

import numpy as np
import pytest

from ingot.runtime.batch import TOKENS, StepBatch, StepLayout, StepSize, pack, size_of
from ingot.runtime.kv_cache import GroupInfo, KVCache
from ingot.runtime.records import SAMPLING, sampling_record
from ingot.runtime.request import Request, SamplingParams, Sequence, Status, TokenLogprob
from ingot.runtime.scheduler import Scheduler

LAYOUT = StepLayout((("full", 16, 7), ("window8", 2, 130)), slots=True, num_samples=16)
PER_TOKEN = ["token_ids", "token_sources", "positions", "slot_mapping_full", "slot_mapping_window8"]


def random_batch(T: int, S: int, R: int, padded: tuple[int, int, int] | None = None) -> StepBatch:
    rng = np.random.default_rng(0)
    size, padding = StepSize(T, S, R, 256), None if padded is None else StepSize(*padded, 256)
    batch = StepBatch(LAYOUT, size, padding, rng.integers(1, 1000, LAYOUT.length(padding or size)).astype(np.int32))
    rng = np.random.default_rng(1)
    for name, values in batch.arrays.items():
        used = values[: size[batch.fields[name].axis]]
        used[...] = rng.integers(1, 500, used.shape)
    batch.arrays["cu_seqlens_q"][: S + 1] = [0, *np.sort(rng.integers(1, T, S - 1)), T]
    return batch


def test_arrays_are_aligned_disjoint_views_of_one_buffer():
    batch = random_batch(11, 3, 5)
    expected = {"token_ids": (11,), "token_sources": (11,), "positions": (11,), "cu_seqlens_q": (4,), "seq_lens": (3,), "logits_rows": (5,),
                "state_slots": (3,), "slot_mapping_full": (11,), "slot_mapping_window8": (11,), "page_table_full": (3, 7),
                "page_table_window8": (3, 128), "temperature": (5,), "top_k": (5,), "top_p": (5,), "min_p": (5,), "seed": (5, 2),
                "num_logprobs": (5,), "target": (5,), "step": (5,)}  # fmt: skip
    assert {name: f.shape for name, f in batch.fields.items()} == expected
    assert {name for name, f in batch.fields.items() if f.dtype == "float32"} == {"temperature", "top_p", "min_p"}
    used = np.zeros(len(batch.buffer), int)
    for name, field in batch.fields.items():
        assert field.offset % 16 == 0
        assert np.shares_memory(batch.arrays[name], batch.buffer)
        used[field.offset : field.offset + batch.arrays[name].size] += 1
    assert used.max() == 1
    assert not used[:TOKENS].any()
    assert len(batch.buffer) == LAYOUT.length(batch.size)


def test_page_tables_are_as_wide_as_the_longest_sequence_needs():
    fields = LAYOUT.fields(StepSize(4, 2, 2, 32))
    assert (fields["page_table_full"].shape, fields["page_table_window8"].shape) == ((2, 2), (2, 16))
    fields = LAYOUT.fields(StepSize(4, 2, 2, 512))
    assert (fields["page_table_full"].shape, fields["page_table_window8"].shape) == ((2, 7), (2, 130))


@pytest.mark.parametrize("padded", [None, (24, 9, 8)])
def test_bytes_round_trip(padded):
    batch = random_batch(19, 4, 6, padded)
    copy = StepBatch.from_bytes(LAYOUT, batch.to_bytes())
    assert (copy.size, copy.padded) == (batch.size, batch.padded) == (StepSize(19, 4, 6, 256), StepSize(*(padded or (19, 4, 6)), 256))
    for name, values in batch.arrays.items():
        np.testing.assert_array_equal(copy.arrays[name], values)
        assert copy.arrays[name].dtype == values.dtype


@pytest.mark.parametrize("padded", [(19, 4, 6), (24, 9, 8), (32, 4, 6), (20, 9, 16)])
def test_padding_has_no_effect(padded):
    T, S, _ = padded
    batch = random_batch(19, 4, 6, padded)
    exact = random_batch(19, 4, 6).arrays
    a = batch.arrays
    for name, values in exact.items():
        np.testing.assert_array_equal(a[name][: len(values)], values)
    samples = np.arange(500, 516, dtype=np.int32)
    assert not batch.input_ids(samples)[19:].any()
    assert not a["positions"][19:].any()
    for name in ("slot_mapping_full", "slot_mapping_window8"):
        assert (a[name][19:] == -1).all()
    assert (a["state_slots"][4:] == -1).all()
    assert not a["seq_lens"][4:].any()
    assert a["cu_seqlens_q"][4:].tolist() == [min(19 + i, T) for i in range(S - 4 + 1)]
    for name, value in [("temperature", 0), ("top_k", 0), ("top_p", 1), ("min_p", 0), ("num_logprobs", -1), ("target", -1), ("logits_rows", 0)]:
        assert (a[name][6:] == value).all()
    with pytest.raises(ValueError, match=r"num_seqs=4.* does not fit in StepSize\(num_tokens=19, num_seqs=3"):
        StepBatch(LAYOUT, StepSize(19, 4, 6, 256), StepSize(19, 3, 6, 256))


def test_a_batch_is_used_again():
    batch = random_batch(19, 4, 6, (24, 9, 8))
    batch.reset(StepSize(5, 3, 2, 256))
    assert batch.arrays["cu_seqlens_q"][3:].tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert (batch.arrays["slot_mapping_full"][5:] == -1).all()
    assert not batch.arrays["seq_lens"][3:].any()
    assert StepBatch.from_bytes(LAYOUT, batch.to_bytes()).size == StepSize(5, 3, 2, 256)


def test_a_sampling_record_is_one_row():
    row = np.frombuffer(sampling_record(SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, logprobs=3), 2**40 + 5), SAMPLING)[0]
    assert row.tolist()[:4] == (0.5, 7, 0.25, 0.125)
    assert row["seed"].view(np.int64) == 2**40 + 5
    assert (row["num_logprobs"], row["target"], row["step"]) == (3, -1, 0)
    greedy = np.frombuffer(sampling_record(SamplingParams(temperature=1e-7, top_k=-1), 2**64 - 1), SAMPLING)[0]
    assert (greedy["temperature"], greedy["top_k"], greedy["num_logprobs"], greedy["seed"].tolist()) == (0, 0, -1, [-1, -1])


def test_pack_by_hand():
    groups = {"full": GroupInfo("page", 4, 32), "window8": GroupInfo("page", 2, 32), "slot": GroupInfo("slot", 0, 5)}
    cache = KVCache(groups, 5, 28)
    layout = StepLayout.of(groups, 5, 28)
    assert layout == StepLayout((("full", 4, 7), ("window8", 2, 14)), True, 16)
    scheduler = Scheduler(cache, max_num_seqs=5, max_num_batched_tokens=64)

    def make(tokens: list[int], num_prompt: int, computed: int, to: int, **params: object) -> Sequence:
        sampling = SamplingParams(seed=1, **params)
        seq = Sequence(Request("r", tokens[:num_prompt], sampling), 0, (0,), 16, array("i", tokens), sampling_record(sampling, 9))
        assert cache.admit(seq)
        assert cache.grow(seq, to)
        cache.rows.num_computed[seq.row] = computed
        seq.status = Status.RUNNING
        return seq

    decode = make([11, 12, 13, 14, 15, 16], 4, 5, 6, temperature=0.5)
    chunk = make(list(range(20, 30)), 10, 3, 7)
    scored = make([41, 42, 43, 44, 45], 5, 1, 5, temperature=0, prompt_logprobs=2, logprobs=1)
    scored.add_prompt_logprob(TokenLogprob(42, -1.0))
    scored.add_prompt_logprob(TokenLogprob(43, -1.0))  # as after a preemption: computed again, not wanted again
    pending = make([71, 72, 73], 3, 3, 4)
    cache.rows.num_tokens[pending.row] = 4  # sampled in the last step, in its row 2
    scheduler.num_launched = 1
    cache.rows.sampled_in[pending.row], cache.rows.sampled_row[pending.row] = 0, 2
    cache.page_tables["full"][decode.row, :2] = [9, 4]
    cache.page_tables["window8"][decode.row, :3] = [7, 8, 30]
    step = scheduler._step_of({decode: 1, chunk: 4, scored: 4, pending: 1})
    assert size_of(step) == StepSize(10, 4, 5, 256)
    batch = StepBatch(layout, size_of(step), StepSize(12, 5, 7, 256), np.full(4096, 999, np.int32))
    pack(step, cache, batch)
    a = batch.arrays
    assert batch.input_ids(np.arange(100, 116, dtype=np.int32)).tolist() == [16, 23, 24, 25, 26, 42, 43, 44, 45, 102, 0, 0]
    assert a["positions"].tolist() == [5, 3, 4, 5, 6, 1, 2, 3, 4, 3, 0, 0]
    assert a["cu_seqlens_q"].tolist() == [0, 1, 5, 9, 10, 11]
    assert a["seq_lens"].tolist() == [6, 7, 5, 4, 0]
    sequences = [decode, chunk, scored, pending]
    assert a["state_slots"].tolist() == [*(s.row for s in sequences), -1]
    assert a["slot_mapping_full"][0] == 4 * 4 + 1
    assert a["slot_mapping_window8"][0] == 30 * 2 + 1
    for name, size in (("full", 4), ("window8", 2)):
        tables = cache.page_tables[name][[s.row for s in sequences]]
        np.testing.assert_array_equal(a[f"page_table_{name}"][:4], tables)
        owners = [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
        expected = [tables[s, p // size] * size + p % size for s, p in zip(owners, a["positions"][:10], strict=True)]
        assert a[f"slot_mapping_{name}"].tolist() == [*expected, -1, -1]
    # three sample (the chunk does not reach its end), then prompt rows: positions 2 and 3 of the third sequence
    assert a["logits_rows"].tolist() == [0, 8, 9, 6, 7, 0, 0]
    assert a["target"].tolist() == [-1, -1, -1, 44, 45, -1, -1]
    assert a["num_logprobs"].tolist() == [-1, 1, -1, 2, 2, -1, -1]
    assert a["temperature"].tolist() == [0.5, 0, 1, 0, 0, 0, 0]
    assert a["step"].tolist() == [2, 0, 1, 0, 0, 0, 0]
    assert a["seed"].tolist() == [[9, 0], [9, 0], [9, 0], *[[0, 0]] * 4]
