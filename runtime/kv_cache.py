"""The paged KV cache's bookkeeping: who holds which page, and which pages hold known prefixes. No torch.

Every state group has its own pool of pages and its own page table, of which a running sequence has a row (`rows.py`). Full
pages are named by a hash chained over their tokens (vLLM's automatic prefix caching, 2024), so that a sequence with the
same prefix takes them over; pages that nobody references stay until their memory is needed and go least recently used first.

A page is named, shared, let go and given to others as soon as the steps that use it are launched: whoever reads or writes it
then does so in a later step, and the device runs steps in order.

Of a group with a window a row keeps only the pages that tokens still to be computed attend to. Columns of the page table
before them repeat the first page kept: what a kernel reads there it masks, and it reads nothing of others.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from .request import Sequence
from .rows import Rows

NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class GroupInfo:
    """A state group as the executor holds it: `num_units` pages of `page_size` tokens, or slots."""

    kind: Literal["page", "slot"]
    page_size: int  # tokens; 0 for slots
    num_units: int
    window: int = 0  # tokens that attention sees, its own included; 0: all before it

    def first_page(self, position: int) -> int:
        """The first page that tokens from `position` on attend to."""
        return max(0, position - self.window + 1) // self.page_size if self.window else 0

    def most_pages(self, num_tokens: int, num_new: int) -> int:
        """The most pages that a sequence of `num_tokens` tokens holds at once when a step computes at most `num_new` of them."""
        pages = -(-num_tokens // self.page_size)
        if not self.window:
            return pages
        # the window and the step together may begin anywhere in a page
        return min(pages, -(-(self.window + num_new - 2) // self.page_size) + 1)


def capacity(groups: Iterable[GroupInfo], max_num_new: int) -> int:
    """Tokens of the longest sequence that page groups can hold alone, when a step computes at most `max_num_new` of them."""

    def tokens(group: GroupInfo) -> int:
        any_length = group.most_pages(NO_LIMIT, max_num_new) <= group.num_units
        return NO_LIMIT if any_length else group.num_units * group.page_size

    return min(map(tokens, groups), default=NO_LIMIT)


class PagePool:
    """The pages of one group. A page is referenced, or idle with a known prefix, or free."""

    def __init__(self, num_pages: int) -> None:
        self.refs = [0] * num_pages
        self.hash_of: dict[int, bytes] = {}
        self.page_of: dict[bytes, int] = {}
        self.free = list(range(num_pages - 1, -1, -1))
        self.idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        return len(self.free) + len(self.idle)

    @property
    def num_used(self) -> int:
        return len(self.refs) - self.num_available

    def take(self) -> int:
        """A page for new tokens; the least recently used prefix is forgotten when none is free. KeyError when all are referenced."""
        if self.free:
            page = self.free.pop()
        else:
            page, _ = self.idle.popitem(last=False)
            del self.page_of[self.hash_of.pop(page)]
        self.refs[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more reference to a page with a known prefix."""
        self.idle.pop(page, None)
        self.refs[page] += 1

    def release(self, page: int) -> None:
        """One reference less."""
        self.refs[page] -= 1
        if self.refs[page] == 0:
            if page in self.hash_of:
                self.idle[page] = None
            else:
                self.free.append(page)

    def name(self, page: int, page_hash: bytes) -> None:
        """Make a full page findable, unless another already holds the same tokens."""
        if page not in self.hash_of and page_hash not in self.page_of:
            self.hash_of[page] = page_hash
            self.page_of[page_hash] = page

    def forget(self) -> None:
        """Take all names away."""
        self.free += self.idle
        for known in (self.idle, self.hash_of, self.page_of):
            known.clear()


class KVCache:
    """Pages and slots of running sequences. `page_tables[group]` is int32 [max_num_seqs, P], P the pages of `max_model_len` tokens.

    `max_num_new`: the most tokens that one step computes of a sequence (0: no limit), on which depends what a window needs.
    """

    def __init__(self, groups: Mapping[str, GroupInfo], max_num_seqs: int, max_model_len: int, enable_prefix_caching: bool = True,
                 max_num_new: int = 0) -> None:  # fmt: skip
        self.max_num_new = max_num_new or max_model_len
        self.groups = {name: g for name, g in groups.items() if g.kind == "page"}
        self.slot_groups = {name: g for name, g in groups.items() if g.kind == "slot"}
        self.pools = {name: PagePool(g.num_units) for name, g in self.groups.items()}
        self.page_tables = {name: np.zeros((max_num_seqs, -(-max_model_len // g.page_size)), np.int32) for name, g in self.groups.items()}
        self.num_rows = min([max_num_seqs, *(g.num_units for g in self.slot_groups.values())])
        self.rows = Rows(self.num_rows, max_model_len)
        self.first_page = {name: np.zeros(self.num_rows, np.int32) for name in self.groups}  # that each row still holds
        self.num_pages = {name: [0] * self.num_rows for name in self.groups}  # of each row, those that it let go included
        self.sequences: dict[int, Sequence] = {}  # by row
        self.copies: list[tuple[int, int, int]] = []  # to be made before the next step: number of the group, from and to page or slot
        self._number = {name: i for i, name in enumerate(groups)}
        self.prefix_queries = self.prefix_hits = 0  # tokens asked for, tokens found
        self.prefix_caching_off = self._why_off(enable_prefix_caching)
        self._free_rows = list(range(self.num_rows - 1, -1, -1))
        sizes = [g.page_size for g in self.groups.values()]
        self._stride = math.lcm(*sizes)  # a prefix ends where a page of every group ends
        self._boundary = math.gcd(*sizes) or 1  # pages end only at multiples of it

    def _why_off(self, enable_prefix_caching: bool) -> str:
        """Why prefixes are not reused; "" when they are."""
        if not enable_prefix_caching:
            return "disabled by the caller"
        if self.slot_groups:
            return f"the model keeps a recurrent state ({', '.join(self.slot_groups)}), which is not saved at page boundaries"
        return "" if self.groups else "the model has no KV pages"

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can have in the cache when it is alone."""
        return capacity(self.groups.values(), self.max_num_new)

    def match(self, seq: Sequence) -> int:
        """Tokens at the start of `seq` that need not be computed; at most all but the last, whose logits are needed.

        Of a group without a window all their pages are there, of one with a window those that the next token attends to.
        """
        if self.prefix_caching_off or seq.wants_prompt_logprobs:
            return 0
        found = len(seq.token_ids) - 1
        for name, group in self.groups.items():
            if not group.window:
                pages = self.pools[name].page_of
                hashes = self._hashes(seq, group.page_size, found // group.page_size)
                count = next((i for i, h in enumerate(hashes) if h not in pages), len(hashes))
                found = min(found, count * group.page_size)
        found -= found % self._stride
        # for each number of pages, how many of the last of them are there without a gap
        runs: list[tuple[GroupInfo, list[int]]] = []
        for name, group in self.groups.items():
            if group.window:
                known = [h in self.pools[name].page_of for h in self._hashes(seq, group.page_size, found // group.page_size)]
                runs.append((group, list(accumulate(known, lambda run, here: run + 1 if here else 0, initial=0))))
        while any(run[n := found // group.page_size] < n - group.first_page(found) for group, run in runs):
            found -= self._stride
        return found

    def admit(self, seq: Sequence, spare: int = 0) -> bool:
        """Give `seq` a row and the pages of its known prefix, whose tokens count as computed.

        False, and nothing changes, when there is no row or some group could not hold what its tokens need and `spare` more pages.
        """
        if not self._free_rows:
            return False
        found = self.match(seq)
        shared: dict[str, list[int]] = {}
        for name, group in self.groups.items():
            pool, first, last = self.pools[name], group.first_page(found), found // group.page_size
            hashes = self._hashes(seq, group.page_size, last)[first:] if found else []
            shared[name] = [pool.page_of[h] for h in hashes]
            idle = sum(pool.refs[p] == 0 for p in shared[name])
            length = len(seq.token_ids)
            wanted = -(-length // group.page_size) - last + idle
            if min(wanted, group.most_pages(length, self.max_num_new)) + spare > pool.num_available:
                return False
        seq.row = row = self._free_rows.pop()
        self.sequences[row] = seq
        for name, pages in shared.items():
            for page in pages:
                self.pools[name].share(page)
            first, last = self.groups[name].first_page(found), found // self.groups[name].page_size
            self.page_tables[name][row, :first] = pages[0] if pages else 0
            self.page_tables[name][row, first:last] = pages
            self.first_page[name][row], self.num_pages[name][row] = first, last
        self.rows.place(seq, row, found)
        if seq.num_cached < 0:
            seq.num_cached = found
            self.prefix_queries += len(seq.token_ids)
            self.prefix_hits += found
        return True

    def fork(self, seq: Sequence, child: Sequence) -> bool:
        """Give `child`, whose tokens begin with those that `seq` has computed, a row with their KV.

        Full pages are shared; a page that is not full, which both will write to, and slots are copied. False, and nothing changes, when
        there is no row or page left.
        """
        row, computed = seq.row, int(self.rows.num_computed[seq.row])
        partial = [name for name, g in self.groups.items() if computed % g.page_size]
        if not self._free_rows or not all(self.pools[name].num_available for name in partial):
            return False
        child.row = new = self._free_rows.pop()
        self.sequences[new] = child
        for name, group in self.groups.items():
            pool, table = self.pools[name], self.page_tables[name]
            first, full = int(self.first_page[name][row]), computed // group.page_size
            for page in table[row, first:full].tolist():
                pool.share(page)
            table[new, :full] = table[row, :full]
            self.first_page[name][new], self.num_pages[name][new] = first, full + (name in partial)
            if name in partial:
                table[new, full] = pool.take()
                self.copies.append((self._number[name], int(table[row, full]), int(table[new, full])))
            if first:
                table[new, :first] = table[new, first] if first < self.num_pages[name][new] else 0
        self.copies += [(self._number[name], row, new) for name in self.slot_groups]
        child.num_cached = seq.num_cached
        self.rows.place(child, new, computed)
        self.rows.num_named[new] = self.rows.num_named[row]
        self.rows.room[new] = min((self.num_pages[name][new] * g.page_size for name, g in self.groups.items()), default=computed)
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make every group hold `num_tokens` tokens of `seq`; False, and nothing changes, when a pool is too empty."""
        row = seq.row
        if num_tokens <= self.rows.room[row]:
            return True
        missing = []
        for name, group in self.groups.items():
            held = self.num_pages[name][row]
            wanted = -(-num_tokens // group.page_size)
            if wanted > held:
                if wanted - held > self.pools[name].num_available:
                    return False
                missing.append((name, held, wanted))
        for name, held, wanted in missing:
            pool = self.pools[name]
            self.page_tables[name][row, held:wanted] = [pool.take() for _ in range(wanted - held)]
            self.num_pages[name][row] = wanted
        self.rows.room[row] = min((self.num_pages[name][row] * g.page_size for name, g in self.groups.items()), default=num_tokens)
        return True

    def launched(self, sequences: list[Sequence], rows: np.ndarray, computed: np.ndarray, known: np.ndarray) -> None:
        """The KV of `computed` [S] tokens of each row is in the pages, or will be before the next step; `known` [S] tokens are known.

        The pages that became full of known tokens can be found from now on, and those that no later token attends to are let go.
        """
        self.copies.clear()  # they are made before the step
        if not self.prefix_caching_off:
            named, known = self.rows.num_named[rows], np.minimum(computed, known)
            for i in (named // self._boundary != known // self._boundary).nonzero()[0].tolist():
                self._name(sequences[i], int(known[i]))
        for name, group in self.groups.items():
            if group.window:
                first = np.maximum(computed - group.window + 1, 0) // group.page_size
                for i in np.flatnonzero(first > self.first_page[name][rows]).tolist():
                    self._slide(name, int(rows[i]), int(first[i]))

    def _name(self, seq: Sequence, num_tokens: int) -> None:
        """Make the full pages among those of the first `num_tokens` tokens findable."""
        row, before = seq.row, int(self.rows.num_named[seq.row])
        for name, group in self.groups.items():
            first, last = max(before // group.page_size, int(self.first_page[name][row])), num_tokens // group.page_size
            if first < last:
                hashes = self._hashes(seq, group.page_size, last)
                for page, page_hash in zip(self.page_tables[name][row, first:last].tolist(), hashes[first:], strict=True):
                    self.pools[name].name(page, page_hash)
        self.rows.num_named[row] = num_tokens

    def _slide(self, name: str, row: int, first: int) -> None:
        """Let go of the pages before `first`."""
        table = self.page_tables[name][row]
        for page in table[self.first_page[name][row] : first].tolist():
            self.pools[name].release(page)
        self.first_page[name][row] = first
        table[:first] = table[first] if first < self.num_pages[name][row] else 0

    def forget_prefixes(self) -> None:
        """What pages hold cannot be trusted: nobody finds them any more."""
        for pool in self.pools.values():
            pool.forget()

    def release(self, seq: Sequence) -> None:
        """Take back the row and every page of `seq`; its full pages stay findable until their memory is needed."""
        if not self.prefix_caching_off:
            self._name(seq, min(int(self.rows.num_computed[seq.row]), len(seq.token_ids)))
        row = seq.row
        self.rows.leave(seq)
        del self.sequences[row]
        self._free_rows.append(row)
        gone = {(self._number[name], row) for name in self.slot_groups}
        for name, pool in self.pools.items():
            # The end of a prefix is of use only with its beginning: let it go first.
            for page in reversed(self._held(name, row)):
                pool.release(page)
                gone.add((self._number[name], page))
            self.first_page[name][row] = self.num_pages[name][row] = 0
        if self.copies:  # a page that is given back is nobody's to fill; only a page of this row alone is to be filled
            self.copies = [c for c in self.copies if (c[0], c[2]) not in gone]

    def _held(self, name: str, row: int) -> list[int]:
        """The pages of a row, in order of their tokens, from `first_page` on."""
        return self.page_tables[name][row, self.first_page[name][row] : self.num_pages[name][row]].tolist()

    def _hashes(self, seq: Sequence, page_size: int, count: int) -> list[bytes]:
        """The names of the first `count` pages, each of all tokens up to its end and of the request's keys."""
        known = seq.page_hashes.setdefault(page_size, [])
        if len(known) < count:
            previous = known[-1] if known else hashlib.blake2b(repr(seq.request.cache_keys).encode(), digest_size=16).digest()
            for begin in range(len(known) * page_size, count * page_size, page_size):
                tokens = seq.token_ids[begin : begin + page_size].tobytes()
                previous = hashlib.blake2b(previous + tokens, digest_size=16).digest()
                known.append(previous)
        return known[:count]

    def check_integrity(self) -> None:
        """AssertionError when pages are lost, shared wrongly, or found under a name that is not theirs."""
        rows = sorted([*self._free_rows, *self.sequences])
        assert rows == list(range(self.num_rows)), f"rows {rows}"
        for name, pool in self.pools.items():
            group = self.groups[name]
            refs: Counter[int] = Counter()
            tokens_of: dict[int, bytes] = {}  # of shared pages
            for row, seq in self.sequences.items():
                assert seq.row == row
                first, pages = int(self.first_page[name][row]), self._held(name, row)
                assert len(set(pages)) == len(pages), f"{name}: a page twice in row {row}"
                room, computed = self.rows.room[row], int(self.rows.num_computed[row])
                assert (first + len(pages)) * group.page_size >= room >= computed, f"{name}: row {row} lacks pages of {computed} tokens"
                assert first == group.first_page(computed), f"{name}: row {row} holds pages from {first} on after {computed} tokens"
                assert set(self.page_tables[name][row, :first]) <= {*pages[:1], *([] if pages else [0])}, f"{name}: row {row} points at pages of others"
                refs.update(pages)
                for i, page in enumerate(pages, first):
                    named = pool.hash_of.get(page)
                    if named is not None or pool.refs[page] > 1:
                        assert (i + 1) * group.page_size <= computed, f"{name}: page {page} of row {row} is shared or named before it is full"
                        tokens = self._hashes(seq, group.page_size, i + 1)[i]
                        assert named in (None, tokens), f"{name}: page {page} of row {row} has another prefix"
                        assert tokens_of.setdefault(page, tokens) == tokens, f"{name}: page {page} is shared between prefixes"
            assert refs == Counter({p: n for p, n in enumerate(pool.refs) if n}), f"{name}: references"
            assert sorted([*refs, *pool.idle, *pool.free]) == list(range(len(pool.refs))), f"{name}: a page is lost or in two places"
            assert pool.page_of == {h: p for p, h in pool.hash_of.items()}, f"{name}: names"
            assert all(p in pool.hash_of for p in pool.idle) and not any(p in pool.hash_of for p in pool.free), f"{name}: idle or free"
