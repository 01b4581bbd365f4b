"""Running sequences as a struct of arrays: what scheduling and packing read of all of them in every step. No torch.

A running sequence has a *row*: the row of every page table, its slot in `slot` groups, and its place in these arrays. They
advance when a step is launched, so that the next one can be scheduled while it runs.
"""

from __future__ import annotations

import numpy as np

from .records import SAMPLING
from .request import Sequence


class Rows:
    """One array a fact, int32, by row; of a row that nobody has, garbage."""

    def __init__(self, num_rows: int) -> None:
        self.counts = np.zeros((4, num_rows), np.int32)  # four facts that every step asks for at once:
        self.num_tokens = self.counts[0]  # prompt and output, with the pending token
        self.num_computed = self.counts[1]  # of these, those whose KV the launched steps compute
        self.end = self.counts[2]  # tokens that are ever computed: the last of `max_tokens` is never fed back
        self.room = self.counts[3]  # tokens for which every page group has pages
        self.num_prompt = np.zeros(num_rows, np.int32)
        self.num_named = np.zeros(num_rows, np.int32)  # of the computed tokens, those whose full pages were given names
        self.launched_in = np.zeros(num_rows, np.int64)  # the last step with this row
        self.sampled_in = np.zeros(num_rows, np.int64)  # the last step that sampled for it,
        self.sampled_row = np.zeros(num_rows, np.int32)  # and there the row of logits
        self.scores = np.zeros(num_rows, bool)  # whether prompt tokens may want log-probabilities
        self.sampling = np.zeros(num_rows, SAMPLING)
        self.chosen = np.zeros(num_rows, bool)  # by the host is its next token, when that step was collected
        self.ruled = np.zeros(num_rows, bool)  # its logits are changed before they are sampled

    def place(self, seq: Sequence, row: int, num_computed: int) -> None:
        """Give `row` to `seq`, of whose tokens, all known, the first `num_computed` have their KV."""
        self.num_prompt[row] = seq.num_prompt
        self.num_tokens[row] = len(seq.token_ids)
        self.num_computed[row] = self.num_named[row] = num_computed
        self.end[row] = seq.num_prompt + seq.max_tokens - 1
        self.room[row] = num_computed
        self.scores[row] = seq.wants_prompt_logprobs
        self.launched_in[row] = self.sampled_in[row] = -1
        self.sampling[row] = np.frombuffer(seq.sampling, SAMPLING)[0]
        self.chosen[row] = seq.beams is not None
        self.ruled[row] = seq.rules is not None
        seq.counted = False

    def uncomputed(self, rows: np.ndarray) -> np.ndarray:
        """Tokens that are still to be computed of each of `rows`: 0 when only the last one's value, or a choice, is awaited."""
        return np.minimum(self.num_tokens[rows], self.end[rows]) - self.num_computed[rows]
