"""What swapped code needs beyond its arguments: the step's metadata and the states, given out in the order of the calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ingot.ops import InputSpec, StateSpec
from ingot.ops.errors import IngotError
from ingot.ops.quantize import LARGEST


class TraceError(IngotError):
    """A model cannot be expressed in the dialect; the message names the module and what it asked for."""


class Context:
    """The states of a model: declared while its shapes run, handed out and replaced by newer versions while it is traced."""

    def __init__(self, page_size: int, kv_dtype: torch.dtype | None, entry_point: str = "forward", calibrated_modules: Mapping[int, str] | None = None) -> None:
        self.page_size = page_size
        self.kv_dtype = kv_dtype
        self.entry_point = entry_point
        self.calibrated: dict[str, None] = {}  # weights that scale k and v, in the order of the calls
        self._modules = calibrated_modules or {}  # names of modules by identity, where a checkpoint brings scales
        self.states: dict[str, StateSpec] = {}
        self.values: dict[str, torch.Tensor] = {}  # step inputs and current versions of the states; empty while shapes run
        self._sites: dict[str, int] = {}

    @property
    def observing(self) -> bool:
        return not self.values

    def begin(self, values: dict[str, torch.Tensor]) -> None:
        """Start a run of the model. Sites are numbered by call order: layers may share a block or attend twice."""
        self.values = dict(values)
        self._sites = {}

    def inputs(self) -> dict[str, InputSpec]:
        """The step inputs that a graph with these states takes."""
        i32 = torch.int32
        inputs = {
            "input_ids": InputSpec(i32, ("T",)),
            "positions": InputSpec(i32, ("T",)),
            "cu_seqlens_q": InputSpec(i32, ("S+1",)),
        }
        if self.entry_point == "embed":
            return inputs | {"pooling": InputSpec(i32, ("S",))}
        inputs |= {
            "seq_lens": InputSpec(i32, ("S",)),
            "logits_rows": InputSpec(i32, ("R",)),
        }
        for spec in self.states.values():
            if spec.kind == "page":
                inputs[f"page_table_{spec.group}"] = InputSpec(i32, ("S", f"P_{spec.group}"))
                inputs[f"slot_mapping_{spec.group}"] = InputSpec(i32, ("T",))
            else:
                inputs["state_slots"] = InputSpec(i32, ("S",))
        return inputs

    def declare(self, **specs: StateSpec) -> list[str]:
        """Names of the states `<kind>_<i>` of one call site, i counting the calls that use `<kind>`."""
        names = []
        for kind, spec in specs.items():
            i = self._sites.get(kind, 0)
            self._sites[kind] = i + 1
            names.append(f"{kind}_{i}")
            if self.observing:
                self.states[names[-1]] = spec
        return names

    def kv_scales(self, module: torch.nn.Module) -> list[torch.Tensor | None]:
        """The calibrated scales of k and v that a checkpoint brings for an attention module, if it brings any."""
        if not self._modules:
            return []
        names = [f"{self._modules[id(module)]}.{n}_scale" for n in ("k", "v")]
        self.calibrated |= dict.fromkeys(names)
        return [self.values.get(n) for n in names]

    def kv_caches(self, k: torch.Tensor, v: torch.Tensor, group: str) -> list[str]:
        """Names of the caches of an attention call with new k [T, K, E] and v [T, K, F], and of their scales where they are quantized."""
        dtype = self.kv_dtype or k.dtype
        heads = int(k.shape[1])
        specs = {f"{n}_cache": StateSpec(group, "page", dtype, (heads, self.page_size, int(t.shape[2]))) for n, t in (("k", k), ("v", v))}
        if dtype in LARGEST:
            specs |= {f"{n}_scale": StateSpec(group, "page", torch.float32, (heads, self.page_size)) for n in ("k", "v")}
        return self.declare(**specs)

    def latent_cache(self, latent: torch.Tensor, rope: torch.Tensor) -> str:
        """Name of the cache of a latent attention call with new latent [T, L] and rope [T, R]."""
        return self.declare(latent_cache=self.latent_page(int(latent.shape[1] + rope.shape[1]), latent.dtype))[0]

    def latent_page(self, width: int, dtype: torch.dtype) -> StateSpec:
        """A cache of one row of `width` a token in the group `latent`. TraceError for a quantized cache, whose rows would need scales."""
        if self.kv_dtype in LARGEST:
            raise TraceError("latent attention has no quantized cache: its rows are latents already; compile with --kv-cache-dtype auto")
        return StateSpec("latent", "page", self.kv_dtype or dtype, (1, self.page_size, width))

    def slot(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype, call: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """`call(state, cu_seqlens_q, seq_lens, state_slots)` → (out, new state) on the slot state of one call site; out."""
        (name,) = self.declare(**{kind: StateSpec("slot", "slot", dtype, shape)})
        if self.observing:
            return call(torch.empty((1, *shape), dtype=dtype, device="meta"), *(torch.empty(n, dtype=torch.int32, device="meta") for n in (2, 1, 1)))[0]
        out, self.values[name] = call(self.values[name], *(self.values[n] for n in ("cu_seqlens_q", "seq_lens", "state_slots")))
        return out


_CURRENT: ContextVar[Context] = ContextVar("trace")


def current() -> Context:
    """The context of the trace that runs now."""
    return _CURRENT.get()


@contextmanager
def tracing(context: Context) -> Iterator[None]:
    """Make `context` the current one."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)
