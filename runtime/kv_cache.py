"""The paged KV cache's bookkeeping: who holds which page, and which pages hold known prefixes. No torch.

Every state group has its own pool of pages and its own page table. A running sequence has a *row*: the row of every
page table, and its slot in `slot` groups. Full pages are named by a hash chained over their tokens (vLLM's automatic
prefix caching, 2024), so that a sequence with the same prefix takes them over; pages that nobody references stay until
their memory is needed and go least recently used first.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .request import Sequence


@dataclass(frozen=True)
class GroupInfo:
    """A state group as the executor holds it: `num_units` pages of `page_size` tokens, or slots."""

    kind: Literal["page", "slot"]
    page_size: int  # tokens; 0 for slots
    num_units: int
    window: int = 0  # tokens that attention looks back; 0: all. All pages are kept nevertheless.


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


class KVCache:
    """Pages and slots of running sequences. `page_tables[group]` is int32 [max_num_seqs, P], P the pages of `max_model_len` tokens."""

    def __init__(self, groups: Mapping[str, GroupInfo], max_num_seqs: int, max_model_len: int, enable_prefix_caching: bool = True) -> None:
        self.groups = {name: g for name, g in groups.items() if g.kind == "page"}
        self.slot_groups = {name: g for name, g in groups.items() if g.kind == "slot"}
        self.pools = {name: PagePool(g.num_units) for name, g in self.groups.items()}
        self.page_tables = {name: np.zeros((max_num_seqs, -(-max_model_len // g.page_size)), np.int32) for name, g in self.groups.items()}
        self.num_rows = min([max_num_seqs, *(g.num_units for g in self.slot_groups.values())])
        self.num_pages = {name: [0] * self.num_rows for name in self.groups}  # of each row
        self._room = [0] * self.num_rows  # tokens for which every group has pages, of each row
        self.sequences: dict[int, Sequence] = {}  # by row
        self.prefix_queries = self.prefix_hits = 0  # tokens asked for, tokens found
        self.prefix_caching_off = self._why_off(enable_prefix_caching)
        self._free_rows = list(range(self.num_rows - 1, -1, -1))
        sizes = [g.page_size for g in self.groups.values()]
        self._stride = math.lcm(*sizes)  # a prefix ends where a page of every group ends
        self._boundary = math.gcd(*sizes)  # pages end only at multiples of it

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
        return min((g.num_units * g.page_size for g in self.groups.values()), default=2**31 - 1)

    def match(self, seq: Sequence) -> int:
        """Tokens at the start of `seq` whose pages every group holds; at most all but the last, which must be computed."""
        if self.prefix_caching_off or seq.wants_prompt_logprobs:
            return 0
        limit = len(seq.token_ids) - 1
        found = limit
        for name, group in self.groups.items():
            pages = self.pools[name].page_of
            hashes = self._hashes(seq, group.page_size, limit // group.page_size)
            count = next((i for i, h in enumerate(hashes) if h not in pages), len(hashes))
            found = min(found, count * group.page_size)
        return found - found % self._stride

    def admit(self, seq: Sequence, spare: int = 0) -> bool:
        """Give `seq` a row and the pages of its known prefix, and set `num_computed` to the prefix' length.

        False, and nothing changes, when there is no row or some group could not hold all its tokens and `spare` more pages.
        """
        if not self._free_rows:
            return False
        found = self.match(seq)
        shared: dict[str, list[int]] = {}
        for name, group in self.groups.items():
            pool = self.pools[name]
            hashes = self._hashes(seq, group.page_size, found // group.page_size) if found else []
            shared[name] = [pool.page_of[h] for h in hashes]
            idle = sum(pool.refs[p] == 0 for p in shared[name])
            if -(-len(seq.token_ids) // group.page_size) - len(hashes) + spare > pool.num_available - idle:
                return False
        seq.row = row = self._free_rows.pop()
        self.sequences[row] = seq
        for name, pages in shared.items():
            for page in pages:
                self.pools[name].share(page)
            self.page_tables[name][row, : len(pages)] = pages
            self.num_pages[name][row] = len(pages)
        self._room[row] = seq.num_computed = found
        if seq.num_cached < 0:
            seq.num_cached = found
            self.prefix_queries += len(seq.token_ids)
            self.prefix_hits += found
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make every group hold `num_tokens` tokens of `seq`; False, and nothing changes, when a pool is too empty."""
        row = seq.row
        if num_tokens <= self._room[row]:
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
        self._room[row] = min((self.num_pages[name][row] * g.page_size for name, g in self.groups.items()), default=num_tokens)
        return True

    def commit(self, seq: Sequence, num_new: int) -> None:
        """`num_new` more tokens of `seq` have their KV in the pages: the pages that became full can be found from now on."""
        before, seq.num_computed = seq.num_computed, seq.num_computed + num_new
        if self.prefix_caching_off or before // self._boundary == seq.num_computed // self._boundary:
            return
        for name, group in self.groups.items():
            first, last = before // group.page_size, seq.num_computed // group.page_size
            if first < last:
                hashes = self._hashes(seq, group.page_size, last)
                for page, page_hash in zip(self.page_tables[name][seq.row, first:last].tolist(), hashes[first:], strict=True):
                    self.pools[name].name(page, page_hash)

    def release(self, seq: Sequence) -> None:
        """Take back the row and every page of `seq`; its full pages stay findable until their memory is needed."""
        row, seq.row = seq.row, -1
        seq.num_computed = 0
        del self.sequences[row]
        self._free_rows.append(row)
        for name, pool in self.pools.items():
            # The end of a prefix is of use only with its beginning: let it go first.
            for page in reversed(self.page_tables[name][row, : self.num_pages[name][row]].tolist()):
                pool.release(page)
            self.num_pages[name][row] = 0

    def _hashes(self, seq: Sequence, page_size: int, count: int) -> list[bytes]:
        """The names of the first `count` pages, each of all tokens up to its end and of the request's keys."""
        known = seq.page_hashes.setdefault(page_size, [])
        if len(known) < count:
            previous = known[-1] if known else hashlib.blake2b(repr(seq.request.cache_keys).encode(), digest_size=16).digest()
            for begin in range(len(known) * page_size, count * page_size, page_size):
                tokens = array("i", seq.token_ids[begin : begin + page_size]).tobytes()
                previous = hashlib.blake2b(previous + tokens, digest_size=16).digest()
                known.append(previous)
        return known[:count]

    def check_integrity(self) -> None:
        """AssertionError when pages are lost, shared wrongly, or found under a name that is not theirs."""
        rows = sorted([*self._free_rows, *self.sequences])
        assert rows == list(range(self.num_rows)), f"rows {rows}"
        for name, pool in self.pools.items():
            size = self.groups[name].page_size
            refs: Counter[int] = Counter()
            for row, seq in self.sequences.items():
                assert seq.row == row
                pages = self.page_tables[name][row, : self.num_pages[name][row]].tolist()
                assert len(set(pages)) == len(pages), f"{name}: a page twice in row {row}"
                assert len(pages) * size >= self._room[row] >= seq.num_computed, f"{name}: row {row} has {len(pages)} pages for {seq.num_computed} tokens"
                refs.update(pages)
                for i, page in enumerate(pages):
                    named = pool.hash_of.get(page)
                    assert named is None or named == self._hashes(seq, size, i + 1)[i], f"{name}: page {page} of row {row} has another prefix"
                    assert refs[page] == 1 or named is not None, f"{name}: page {page} is shared without a name"
            assert refs == Counter({p: n for p, n in enumerate(pool.refs) if n}), f"{name}: references"
            assert sorted([*refs, *pool.idle, *pool.free]) == list(range(len(pool.refs))), f"{name}: a page is lost or in two places"
            assert pool.page_of == {h: p for p, h in pool.hash_of.items()}, f"{name}: names"
            assert all(p in pool.hash_of for p in pool.idle) and not any(p in pool.hash_of for p in pool.free), f"{name}: idle or free"
