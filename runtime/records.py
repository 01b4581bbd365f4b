"""What the sampler is told of a row of logits: one record, made when a request arrives and copied into every step. No torch."""

from __future__ import annotations

import struct

import numpy as np

from .request import SamplingParams

SAMPLING = np.dtype([("temperature", "f4"), ("top_k", "i4"), ("top_p", "f4"), ("min_p", "f4"), ("num_logprobs", "i4"), ("target", "i4"),
                     ("step", "i4"), ("seed", "i4", 2)])  # fmt: skip
"""What is known of each row of logits. temperature 0: greedy; top_k 0: off; num_logprobs −1: none, 0: of the chosen token; target: the token
whose log-probability a prompt row wants, or −1; step: tokens generated before; `seed` low and high half of 64 bits."""
WORDS, STEP = SAMPLING.itemsize // 4, 6
"""Of a record as int32s: how many there are, and which of them is the step. All fields but the last have one."""
GREEDY = np.array([(0, 0, 1, 0, -1, -1, 0, (0, 0))], SAMPLING)
_RECORD = struct.Struct("<fiffiiiQ")


def sampling_record(params: SamplingParams, seed: int) -> bytes:
    """One `SAMPLING` record, its step still 0; `seed` 0 … 2⁶⁴ − 1."""
    temperature = 0.0 if params.greedy else params.temperature
    least = 0 if params.ranked else -1
    num_logprobs = least if params.logprobs is None else params.logprobs
    return _RECORD.pack(temperature, max(params.top_k, 0), params.top_p, params.min_p, num_logprobs, -1, 0, seed)
