"""What the numeric gate compares, as JSON: a call, the launches that compute it, and its reference.

An artifact holds its checks in `checks.json`, so that a machine which has the device, and neither compiler nor model code,
can run a gate that was deferred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch

from ingot.ops.dims import Dim
from ingot.ops.errors import IngotError
from ingot.ops.kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor, Tickets

from .artifact import Artifact
from .eager import constant, function, value
from .plan import Arg, Entry, Grid

CHECKS = "checks.json"


class TensorType(msgspec.Struct, frozen=True, omit_defaults=True):
    """The type of an argument, a result or a scratch tensor."""

    dtype: str
    shape: tuple[Dim, ...]
    tickets: bool = False

    def restore(self) -> Tensor:
        return (Tickets if self.tickets else Tensor)(getattr(torch, self.dtype), self.shape)


class CheckedLaunch(msgspec.Struct, frozen=True, omit_defaults=True):
    """A launch of `kernel`, or the library call of this name, whose arguments are named as in the check."""

    backend: Literal["tvm", "triton", "torch"]
    kernel: str
    args: tuple[Arg, ...]
    grid: tuple[Grid, ...] = ()

    def restore(self) -> Launch:
        """The launch, whose source is only a name."""
        return Launch(Source("", self.backend, self.kernel, ""), tuple(map(_operand, self.args)), tuple((g.dim, g.block) for g in self.grid))


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call in a range of steps, computed by `launches` and meant by the dialect op `op`, or else by `reference`.

    `tensors` has the types of tensors by name: tensor arguments by their own, results as "out.0", scratch as "scratch.0".
    """

    op: str
    steps: Steps
    arguments: dict[str, Arg]  # in the order in which the reference takes them; a tensor has its own name as value
    tensors: dict[str, TensorType]
    launches: tuple[CheckedLaunch, ...]
    reference: tuple[Entry, ...] = ()  # of a region: torch entries over its arguments
    returns: tuple[str, ...] = ()  # values of `reference`, one a result

    @property
    def kernels(self) -> list[str]:
        """Names of the generated kernels that it runs."""
        return [launch.kernel for launch in self.launches if launch.backend != "torch"]

    def restore(self) -> tuple[Call, Candidate]:
        """The call and the candidate that it was made from; a region is a function that interprets `reference`."""
        tensors = {n: t.restore() for n, t in self.tensors.items()}
        args = {n: tensors[n] if a.value == n else a.dim if a.dim is not None else value(a, _no_tensor, {}, _CPU) for n, a in self.arguments.items()}
        results, scratch = (tuple(t for n, t in tensors.items() if n.startswith(prefix)) for prefix in ("out.", "scratch."))
        region = InterpretedRegion(self) if self.returns else None
        launches = tuple(x.restore() for x in self.launches)
        return Call(self.op, args, results, region), Candidate(self.op, launches, scratch)


def describe(call: Call, steps: Steps, candidate: Candidate, kernels: Sequence[str], reference: tuple[Entry, ...], returns: tuple[str, ...]) -> Check:
    """The check of a candidate whose launches run `kernels`; `reference` and `returns` are empty for a dialect op."""
    named = {n: a for n, a in call.args.items() if isinstance(a, Tensor)}
    named |= {f"out.{i}": t for i, t in enumerate(call.results)} | {f"scratch.{i}": t for i, t in enumerate(candidate.scratch)}
    return Check(
        op=call.op,
        steps=steps,
        arguments={n: Arg(value=n) if isinstance(a, Tensor) else _argument(n, a) for n, a in call.args.items()},
        tensors={n: TensorType(_name(t.dtype), t.shape, isinstance(t, Tickets)) for n, t in named.items()},
        launches=tuple(
            CheckedLaunch(x.source.backend, kernel, tuple(_arg(o, call) for o in x.operands), tuple(Grid(d, b) for d, b in x.grid))
            for x, kernel in zip(candidate.launches, kernels, strict=True)
        ),
        reference=reference,
        returns=returns,
    )


def read_checks(artifact: Artifact) -> tuple[Check, ...]:
    """The checks of an artifact. ArtifactError when they cannot be read."""
    return artifact.decode(CHECKS, tuple[Check, ...])


@dataclass(frozen=True)
class InterpretedRegion:
    """Calls a region's reference entry by entry."""

    check: Check

    def __call__(self, *arguments: torch.Tensor) -> Any:
        named = dict(zip(self.check.arguments, arguments, strict=True))
        sizes = {s: n for name, t in named.items() for d, n in zip(self.check.tensors[name].shape, t.shape, strict=True) for s in _symbol(d)}
        device = arguments[0].device
        for entry in self.check.reference:
            args = [value(a, named.__getitem__, sizes, device) for a in entry.args]
            kwargs = {k: value(a, named.__getitem__, sizes, device) for k, a in entry.kwargs.items()}
            named[entry.outputs[0]] = function(entry.target)(*args, **kwargs)
        results = tuple(named[r] for r in self.check.returns)
        return results[0] if len(results) == 1 else results


_CPU = torch.device("cpu")


def _no_tensor(name: str) -> torch.Tensor:
    raise KeyError(name)


def _symbol(dim: Dim) -> list[str]:
    """The symbol that a size alone is."""
    return list(dim) if isinstance(dim, dict) and list(dim.values()) == [1] and "" not in dim else []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _argument(name: str, given: Any) -> Arg:
    if isinstance(given, dict):
        return Arg(dim=given)
    if isinstance(given, (list, tuple)):
        return Arg(items=tuple(_argument(name, g) for g in given))
    arg = constant(given)
    if arg is None:
        raise IngotError(f"argument {name} is a {type(given).__name__}, which has no form in an artifact")
    return arg


def _arg(o: Operand, call: Call) -> Arg:
    if o.pitch is not None:  # the gate's arguments are contiguous
        return Arg(dim=math.prod(call.args[o.pitch].shape[1:]))
    tensor = o.arg if o.arg is not None else f"out.{o.out}" if o.out is not None else f"scratch.{o.scratch}" if o.scratch is not None else None
    if tensor is not None:
        return Arg(value=tensor, view="" if o.view is None else _name(o.view))
    return Arg(dim=o.size) if o.size is not None else Arg(const=o.const)


def _operand(arg: Arg) -> Operand:
    if arg.value is None:
        return Operand(size=arg.dim) if arg.dim is not None else Operand(const=arg.const)  # type: ignore[arg-type]
    kind, _, index = arg.value.partition(".")
    view = getattr(torch, arg.view) if arg.view else None
    return Operand(**({kind: int(index)} if index else {"arg": arg.value}), view=view)  # type: ignore[arg-type]
