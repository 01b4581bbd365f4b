"""What a step's kernels read is what was packed, however host buffers and sizes change from step to step."""

import numpy as np
import pytest
import torch

from ingot.runtime.batch import TOKENS, StepLayout, StepSize
from ingot.runtime.staging import Staging

LAYOUT = StepLayout((("full", 16, 40), ("window8", 4, 160)), slots=False, num_samples=16)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_input_ids_and_page_tables_arrive_and_samples_stay(device):
    staging = Staging(LAYOUT, StepSize(64, 16, 32, 640), torch.device(device))
    rng = np.random.default_rng(0)
    samples = np.zeros(16, np.int32)
    for _ in range(60):
        T = int(rng.integers(1, 40))
        S, R, longest = int(rng.integers(1, min(T, 16) + 1)), int(rng.integers(1, 17)), int(rng.choice([256, 512]))
        size, padded = StepSize(T, S, R, longest), StepSize(T + int(rng.integers(0, 3)) * 8, 16, 20, longest)
        batch = staging.batch(size, padded)
        a = batch.arrays
        for name in ("token_ids", "positions", "page_table_full", "page_table_window8"):
            used = a[name][: size[batch.fields[name].axis]]
            used[...] = rng.integers(0, 1000, used.shape)
        pending = rng.random(T) < 0.5
        rows = rng.integers(0, 16, T)
        a["token_sources"][:T] = np.where(pending, rows, LAYOUT.num_samples + TOKENS + np.arange(T))
        expected = np.where(pending, samples[rows], a["token_ids"][:T])
        tables = {g: a[f"page_table_{g}"][:S].copy() for g in ("full", "window8")}
        staging.upload(batch)
        staging.gather(padded)()
        inputs = staging.inputs(padded)
        found = inputs["input_ids"][: padded.num_tokens].cpu().numpy()
        np.testing.assert_array_equal(found[:T], expected)
        assert not found[T:].any()
        for group, table in tables.items():
            np.testing.assert_array_equal(inputs[f"page_table_{group}"][:S, : table.shape[1]].cpu().numpy(), table)
        np.testing.assert_array_equal(inputs["positions"][:T].cpu().numpy(), a["positions"][:T])
        sampled = rng.integers(-2, 900, 20).astype(np.int32)
        staging.keep(torch.from_numpy(sampled).to(device))()
        samples = np.maximum(sampled[:16], 0)
