"""What a step cannot be faster than: the bytes it must read at the memory's bandwidth, the arithmetic it must do at the device's rate.

Matrix products, attention and recurrences wait for one another, layer by layer, so that their times add; within each, reading and
arithmetic overlap, and the longer one counts. A weight is read once a step, a cached token once for each sequence that it belongs to,
and a recurrent state is read and written once (its arithmetic is not counted).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.manifest import Manifest, WeightTensor
from ingot.artifacts.plan import Entry, Value, Variant
from ingot.ops.dims import Dim, evaluate, product

from .rates import Rates

WRITES = ("ingot.kv_write", "ingot.qkv_rope_kv_write", "ingot.latent_write", "ingot.latent_rope_write")
"""Ops that have a cache among their arguments and do not read it."""
EXPERTS = ("ingot.moe", "ingot.quantized_moe", "ingot.grouped_linear")
MULTIPLIES = ("ingot.linear", "ingot.rms_norm_linear", "ingot.quantized_linear", "ingot.add_rms_norm_quantized_linear", "ingot.glu_quantized_linear",
              "ingot.head_linear", *EXPERTS)  # fmt: skip
"""How the names of ops begin that multiply rows with weights; of experts, with one of many."""


@dataclass(frozen=True)
class Product:
    """Matrices [X, …] of `elements` in all, `nbytes` large, of which each of `rows` rows is multiplied by one (X = 1: by the only one).

    Of experts, `active` rows are one token's, and no two of these have the same. `codes`: the kind of 8-bit codes that rows are rounded to, if any.
    """

    rows: Dim
    elements: int
    nbytes: int
    experts: int = 1
    active: int = 1
    codes: str = ""

    def read(self, rows: int) -> float:
        """Bytes, if tokens choose their experts at random."""
        return self.nbytes * (1 - (1 - self.active / self.experts) ** (rows / self.active))

    def flops(self, rows: int) -> float:
        return 2.0 * rows * self.elements / self.experts


@dataclass(frozen=True)
class Attention:
    """All attention sites of one window (0: none): flops a pair of query and key, over all heads; bytes of a cached token."""

    flops: float
    nbytes: int
    window: int

    def keys(self, cached: int, new: int) -> int:
        """How many tokens of the cache `new` queries after `cached` tokens read."""
        return min(cached + new, self.window + new - 1) if self.window else cached + new

    def pairs(self, cached: int, new: int) -> int:
        """How many keys these queries see, added up."""
        end = cached + new
        within = min(end, max(self.window, cached)) if self.window else end  # queries before it see everything before them
        return (within * (within + 1) - cached * (cached + 1)) // 2 + (end - within) * self.window


@dataclass(frozen=True)
class Floor:
    """Bounds for one artifact on one device."""

    rates: Rates
    products: tuple[Product, ...]
    attention: tuple[Attention, ...]
    other_bytes: int  # of weights that multiply no rows: norms, biases
    state_bytes: int = 0  # of a sequence's recurrent states

    @classmethod
    def of(cls, artifact: Artifact) -> Floor:
        """Read off the plan what a step computes; look up the device's rates, or measure them."""
        manifest = artifact.manifest
        plan = artifact.plan(manifest.variants[0])
        largest = next(v for v in map(artifact.plan, reversed(manifest.variants)) if v.entry_point == plan.entry_point)
        products, attention, other = _costs(plan, manifest, _gathered(largest))
        kinds = {p.codes for p in products} - {""}
        states = sum(g.bytes_per_unit for g in manifest.groups if g.kind == "slot")
        return cls(Rates.of(manifest.target.device, manifest.options.dtype, kinds), products, attention, other, states)

    @property
    def weight_bytes(self) -> int:
        """All that a step may read."""
        return self.other_bytes + sum(p.nbytes for p in self.products)

    def read(self, num_tokens: int, num_seqs: int) -> float:
        """Bytes of weights that a step reads."""
        sizes = {"T": num_tokens, "S": num_seqs, "R": num_seqs}
        return self.other_bytes + sum(p.read(evaluate(p.rows, sizes)) for p in self.products)

    def seconds(self, cached: Sequence[int], new: Sequence[int]) -> float:
        """A step of sequences with so many cached and new tokens, each of which wants the logits of its last token alone."""
        sizes = {"T": sum(new), "S": len(new), "R": len(new)}
        read = self.read(sum(new), len(new))
        multiply = sum(p.flops(evaluate(p.rows, sizes)) / self.rates.codes.get(p.codes, self.rates.flops) for p in self.products)
        kv = sum(a.nbytes * sum(map(a.keys, cached, new)) for a in self.attention)
        attend = sum(a.flops * sum(map(a.pairs, cached, new)) for a in self.attention) / self.rates.flops
        states = self.state_bytes * sum(2 if c else 1 for c in cached)  # a sequence that starts has none to read
        return max(read / self.rates.bandwidth, multiply) + max(kv / self.rates.bandwidth, attend) + states / self.rates.bandwidth

    def decode(self, num_seqs: int, context: int) -> float:
        """Seconds of a step of one token for each sequence, each of them seeing `context` tokens."""
        return self.seconds([context - 1] * num_seqs, [1] * num_seqs)

    def prefill(self, num_tokens: int) -> float:
        """Seconds of a prompt that is computed in one step."""
        return self.seconds([0], [num_tokens])

    def load(self, prompts: Sequence[int], outputs: Sequence[int]) -> float:
        """Seconds of requests that come together: all prompts in one step, then the decode steps, fewer sequences in each as some end."""
        total = self.seconds([0] * len(prompts), prompts)
        for step in range(1, max(outputs)):
            cached = [p + step - 1 for p, n in zip(prompts, outputs, strict=True) if n > step]
            total += self.seconds(cached, [1] * len(cached))
        return total


def _gathered(plan: Variant) -> set[str]:
    """Weights that a plan multiplies by no rows but those that logits are wanted of: those of the last layer, behind its attention."""
    values = {v.name: v for v in plan.values}
    nodes = {e.node for e in plan.entries if any(values[n].shape[:1] == ({"R": 1},) for n in e.outputs)}
    return {values[n].root or n for e in plan.entries if e.node in nodes for a in e.args for n in a.names()}


def _costs(plan: Variant, manifest: Manifest, gathered: Collection[str] = ()) -> tuple[tuple[Product, ...], tuple[Attention, ...], int]:
    values = {v.name: v for v in plan.values}
    weights, groups = {w.name: w for w in manifest.weights}, {g.name: g for g in manifest.groups}
    codes = {layer["node"]: layer["activation"].partition("_")[0].removeprefix("none") for layer in manifest.report.get("layers", ())}
    nodes: dict[str, list[Entry]] = {}
    for entry in plan.entries:
        if entry.target != "ingot.embedding":  # it reads a row a token
            nodes.setdefault(entry.node, []).append(entry)
    products: list[Product] = []
    sites: dict[int, tuple[float, int]] = {}  # window → flops, bytes
    others: set[str] = set()
    for entries in nodes.values():
        roots = {values[n].root or n for e in entries for a in e.args for n in a.names()}
        out = values[entries[0].outputs[0]] if entries[0].outputs else None
        multiplies, dims = entries[0].target.startswith(MULTIPLIES), 3 if entries[0].target.startswith(EXPERTS) else 2
        for weight in (weights[r] for r in sorted(roots) if r in weights):
            if multiplies and len(weight.shape) >= dims:
                made = _product(weight, out, entries, values, codes.get(entries[0].node, ""))
                products.append(replace(made, rows=_of_logits(made.rows)) if weight.name in gathered else made)
            else:
                others.add(weight.name)
        caches = [s for s in manifest.states if s.name in roots and groups[s.group].kind == "page"]
        if caches and out is not None and entries[0].target not in WRITES:
            group, given = groups[caches[0].group], [values[n] for a in entries[0].args for n in a.names() if n not in entries[0].outputs]
            listed = [v.shape[1] for v in given if v.dtype == "int32" and v.storage == "arena" and len(v.shape) == 2]
            window = int(listed[0]) if listed else group.window  # type: ignore[arg-type]  # of sparse attention, so many tokens are seen
            flops, nbytes = sites.get(window, (0.0, 0))
            token = sum(math.prod(s.shape) * _itemsize(s.dtype) for s in caches) // group.page_size
            scored = given[0] if entries[0].target == "ingot.sparse_index" else out
            sites[window] = flops + _pair_flops(scored, caches[0].shape[-1], scored is out), nbytes + token
    attention = tuple(Attention(flops, nbytes, window) for window, (flops, nbytes) in sites.items())
    return tuple(products), attention, sum(_nbytes(weights[n]) for n in others)


def _of_logits(rows: Dim) -> Dim:
    return {"R" if n == "T" else n: c for n, c in rows.items()} if isinstance(rows, dict) else rows


def _product(weight: WeightTensor, out: Value | None, entries: list[Entry], values: dict[str, Value], codes: str) -> Product:
    assert out is not None
    rows, experts, active = out.shape[0], 1, 1
    if entries[0].target.startswith(EXPERTS):
        experts = weight.shape[0]
        given = [values[n] for e in entries for a in e.args for n in a.names() if n not in e.outputs]
        ids = next(v for v in given if v.dtype.startswith("int") and v.storage == "arena")
        rows = product(ids.shape[0], ids.shape[1] if len(ids.shape) == 2 else 1)
        active = rows.get("T", 1) if isinstance(rows, dict) else 1
    elements = math.prod(weight.shape) * (8 if weight.dtype == "int32" else 1)  # a word holds eight codes of 4 bits
    return Product(rows, elements, _nbytes(weight), experts, active, codes)


def _pair_flops(out: Value, key_size: int, weighs: bool) -> float:
    """Multiplying a query with a key and, if it `weighs` values, a probability with a value, for all heads: out is [T, H, F]."""
    heads, value_size = out.shape[1:]
    assert isinstance(heads, int) and isinstance(value_size, int)
    return 2.0 * heads * (key_size + value_size * weighs)


def _nbytes(weight: WeightTensor) -> int:
    return math.prod(weight.shape) * _itemsize(weight.dtype)


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
