"""From the model's logits to those that are sampled: biases, bans, allowed tokens and penalties, on CPU and CUDA alike.

Nothing waits for the device. The order is that of vLLM and transformers: biases and bans, repetition penalty (Keskar et al. 2019,
CTRL), frequency and presence penalty (OpenAI's API), allowed tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from .logit_rules import FIELDS, IN_PROMPT, LogitEdits

_CHUNK = 1 << 22  # logits worked on at once, which bounds the temporaries


def processor_bytes(num_lines: int, num_rows: int, vocab_size: int) -> int:
    """What a `LogitsProcessor` holds on the device."""
    return 4 * (num_lines + num_rows) * vocab_size


class DeviceEdits:
    """A step's `LogitEdits` on the device, by name; empty ones are left out. `host`: the same here."""

    def __init__(self, edits: LogitEdits, device: torch.device) -> None:
        self.host = edits.arrays
        host = torch.from_numpy(edits.buffer)
        buffer = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
        self.arrays: dict[str, torch.Tensor] = {}
        begin = len(FIELDS)
        for (name, kind), array in zip(FIELDS.items(), edits.arrays.values(), strict=True):
            part = buffer[begin : begin + len(array)]
            self.arrays[name] = part.view(torch.float32) if kind == "f4" else part.long()
            begin += len(array)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return self.arrays[name].numel() > 0


class LogitsProcessor:
    """Applies edits, and counts the tokens of sequences with penalties. What it needs is there from the start: `processor_bytes`."""

    def __init__(self, num_lines: int, num_rows: int, vocab_size: int, device: torch.device) -> None:
        """`num_lines`: sequences that run at once. `num_rows`: of logits, at most."""
        self._vocab_size = vocab_size
        self.counts = torch.empty(num_lines, vocab_size, dtype=torch.int32, device=device)  # a line is cleared when a sequence gets it
        self._processed = torch.empty(num_rows, vocab_size, device=device)  # plans are bound to where it lies

    def process(self, logits: torch.Tensor, edits: DeviceEdits, newest: torch.Tensor) -> torch.Tensor:
        """What to sample from instead of `logits` [R, V]: float32, overwritten by the next call. `newest` [R]: the token before each row's next."""
        logits = self._processed[: len(logits)].copy_(logits)
        vocab_size = logits.shape[1]
        if "edit_rows" in edits:
            rows, condition = edits["edit_rows"], edits["edit_conditions"]
            value = torch.where((condition < 0) | (newest[rows] == condition), edits["edit_values"], 0.0)
            logits.view(-1).index_add_(0, rows * vocab_size + edits["edit_tokens"], value)
        if "penalty_rows" in edits:
            if "new_lines" in edits:
                self.counts.index_fill_(0, edits["new_lines"], 0)
                places = edits["seen_lines"] * vocab_size + edits["seen_tokens"]
                self.counts.view(-1).index_add_(0, places, edits["seen_counts"].int())
            size = max(1, _CHUNK // vocab_size)
            for begin in range(0, len(edits["penalty_rows"]), size):
                self._penalize(logits, edits, slice(begin, begin + size))
        if "restricted_rows" in edits:
            size = max(1, _CHUNK // vocab_size)
            for begin in range(0, len(edits["restricted_rows"]), size):
                self._restrict(logits, edits, begin, begin + size)
        return logits

    def _restrict(self, logits: torch.Tensor, edits: DeviceEdits, begin: int, end: int) -> None:
        rows, (first, last) = edits["restricted_rows"][begin:end], np.searchsorted(edits.host["allowed_in"], (begin, end)).tolist()
        allowed = torch.zeros(len(rows), self._vocab_size, dtype=torch.bool, device=logits.device)
        allowed.view(-1).index_fill_(0, (edits["allowed_in"][first:last] - begin) * self._vocab_size + edits["allowed_tokens"][first:last], True)
        logits.index_copy_(0, rows, logits[rows].masked_fill_(~allowed, float("-inf")))

    def _penalize(self, logits: torch.Tensor, edits: DeviceEdits, some: slice) -> None:
        rows = edits["penalty_rows"][some]
        repetition, presence, frequency = (edits[n][some, None] for n in ("repetition", "presence", "frequency"))
        seen = self.counts[edits["penalty_lines"][some]]
        output = seen & (IN_PROMPT - 1)
        scores = logits[rows]
        scores = torch.where(seen > 0, torch.where(scores < 0, scores * repetition, scores / repetition), scores)
        scores -= frequency * output + presence * (output > 0)
        logits.index_copy_(0, rows, scores)

    def count(self, edits: DeviceEdits, token_ids: torch.Tensor) -> None:
        """`token_ids` [R] were sampled."""
        if "penalty_rows" in edits:
            tokens = token_ids[edits["penalty_rows"]].clamp(min=0)  # no token: the sequence ends
            places = edits["penalty_lines"] * self._vocab_size + tokens
            self.counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
