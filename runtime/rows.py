"""Running sequences as a struct of arrays: what scheduling and packing read of all of them in every step. No torch.

A running sequence has a *row*: the row of every page table, its slot in `slot` groups, and its place in these arrays. They
advance when a step is launched, so that the next one can be scheduled while it runs.
"""

from __future__ import annotations

import numpy as np

from .records import SAMPLING, WORDS
from .request import Sequence


class Rows:
    """One line of `facts` a fact, by row; of a row that nobody has, garbage. A step asks for all at once: `facts.take(rows, 1)`."""

    SCORES, CHOSEN, RULED = 1, 2, 4

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        self.facts = np.zeros((9, num_rows), np.int64)
        self.num_tokens = self.facts[0]  # prompt and output, with the pending token
        self.num_computed = self.facts[1]  # of these, those whose KV the launched steps compute
        self.end = self.facts[2]  # tokens that are ever computed: the last of `max_tokens` is never fed back
        self.room = self.facts[3]  # tokens for which every page group has pages
        self.num_prompt = self.facts[4]
        self.sampled_in = self.facts[5]  # the last step that sampled for it,
        self.sampled_row = self.facts[6]  # and there the row of logits
        # few have one: its prompt tokens may want log-probabilities; by the host is its next token chosen, when that step was collected;
        # its logits are changed before they are sampled
        self.flags = self.facts[7]
        self.launched_in = self.facts[8]  # the last step with this row
        # since a token of the sequence was looked at here: until its last one nothing but the token matters, and its text is in whole characters
        self.flowing = np.zeros(num_rows, bool)
        self.tokens = np.zeros((num_rows, max_model_len), np.int32)  # all that are known; what is not touched takes no memory
        self.num_known = np.zeros(num_rows, np.int64)
        self.request_ids, self.index = np.full(num_rows, "", object), np.zeros(num_rows, np.int64)
        self.num_named = np.zeros(num_rows, np.int64)  # of the computed tokens, those whose full pages were given names
        self.sampling = np.zeros(num_rows, SAMPLING)
        self.sampling_words = self.sampling.view(np.int32).reshape(num_rows, WORDS)

    def place(self, seq: Sequence, row: int, num_computed: int) -> None:
        """Give `row` to `seq`, of whose tokens, all known, the first `num_computed` have their KV."""
        flags = self.SCORES * seq.wants_prompt_logprobs + self.CHOSEN * (seq.beams is not None) + self.RULED * (seq.rules is not None)
        self.facts[:, row] = len(seq.known), num_computed, seq.last, num_computed, seq.num_prompt, -1, 0, flags, -1
        self.tokens[row, : len(seq.known)], self.num_known[row], seq.rows = seq.known, len(seq.known), self
        self.request_ids[row], self.index[row] = seq.request.id, seq.index
        self.num_named[row] = num_computed
        self.sampling[row] = np.frombuffer(seq.sampling, SAMPLING)[0]
        seq.counted = False

    def leave(self, seq: Sequence) -> None:
        """`seq` has no row any more."""
        self.settle(seq)
        self.flowing[seq.row] = False
        seq.row, seq.rows = -1, None

    def append(self, rows: np.ndarray | int, num_tokens: np.ndarray | int, new: np.ndarray | int) -> None:
        """The token `new` comes after the `num_tokens` of each of `rows`."""
        self.tokens[rows, num_tokens] = new
        self.num_known[rows] = num_tokens + 1

    def settle(self, seq: Sequence) -> None:
        """Let `seq` know what was appended to its row."""
        begin, end = len(seq.known), self.num_known[seq.row]
        if begin < end:
            seq.known.frombytes(self.tokens[seq.row, begin:end].tobytes())

    def uncomputed(self, rows: np.ndarray) -> np.ndarray:
        """Tokens that are still to be computed of each of `rows`: 0 when only the last one's value, or a choice, is awaited."""
        return np.minimum(self.num_tokens[rows], self.end[rows]) - self.num_computed[rows]
