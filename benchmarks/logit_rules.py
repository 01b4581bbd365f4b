"""What rules for logits cost beside sampling: python benchmarks/logit_rules.py --rows 64 --vocab 151936"""

import argparse
import time
from array import array
from typing import Any

import numpy as np
import torch

from ingot.runtime.batch import StepBatch, StepLayout, StepSize
from ingot.runtime.logit_rules import LogitEdits, LogitRules
from ingot.runtime.records import SAMPLING, sampling_record
from ingot.runtime.request import Request, SamplingParams, Sequence
from ingot.runtime.sampler import Sampler

KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "one row with penalties": {"repetition_penalty": 1.1},
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.3},
    "biases of 100 tokens": {"logit_bias": dict.fromkeys(range(100), 1.0)},
    "1,000 allowed tokens": {"allowed_token_ids": range(1000)},
}


def step_of(rows: int, vocab: int, kind: str) -> tuple[StepBatch, float]:
    """A step of `rows` sequences that decode, and the milliseconds it took to pack its rules."""
    params = SamplingParams(temperature=0.8, top_p=0.95, **KINDS[kind])
    batch = StepBatch(StepLayout((), slots=False, num_samples=rows), StepSize(rows, rows, rows, 256))
    for name in SAMPLING.fields or ():
        batch.arrays[name][:] = np.frombuffer(sampling_record(params, 1) * rows, SAMPLING)[name]
    batch.arrays["logits_rows"][:] = np.arange(rows)
    prompt = np.random.default_rng(0).integers(0, vocab, 500).tolist()
    ruled = range(1 if kind.startswith("one") else rows)
    sequences = [Sequence(Request("r", prompt, params), 0, (0,), 64, array("i", prompt), b"", rules=LogitRules.of(params, (), [], vocab), row=r) for r in ruled]
    begin = time.perf_counter()
    batch.edits = LogitEdits.pack([(r, s, 0) for r, s in enumerate(sequences)])
    batch.edits = LogitEdits.pack([(r, s, 1) for r, s in enumerate(sequences)])  # the second time, as in every step but the first
    return batch, (time.perf_counter() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits = torch.randn(args.rows, args.vocab, device=device, dtype=torch.bfloat16)
    ids = torch.arange(args.rows, dtype=torch.int32, device=device)
    sampler = Sampler(args.rows, args.rows, args.vocab, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(f"{args.rows} rows of {args.vocab} logits, {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
    for kind in KINDS:
        batch, packing = step_of(args.rows, args.vocab, kind)
        buffer = torch.from_numpy(batch.buffer).to(device)
        for _ in range(3):
            sampler(logits, batch, ids, buffer)
        wait()
        begin = time.perf_counter()
        for _ in range(args.repeats):
            sampler(logits, batch, ids, buffer)
        enqueued = time.perf_counter() - begin
        wait()
        elapsed = time.perf_counter() - begin
        print(f"{kind:24} {elapsed / args.repeats * 1e3:7.3f} ms a step, host {enqueued / args.repeats * 1e3:6.3f} ms, packed twice in {packing:.2f} ms")


if __name__ == "__main__":
    main()
