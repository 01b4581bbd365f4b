"""Target: the instruction set that an artifact's kernels are compiled for, and the device profile that they were tuned on."""

from __future__ import annotations

import functools
import platform
import re

import msgspec

from .cuda import first_device
from .errors import IngotError

GPU_ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHARED_MEMORY_BYTES = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
"""The most shared memory that one block may have (CUDA programming guide, technical specifications)."""
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16")
"""The features that generated code asks about, in /proc/cpuinfo's spelling."""
CPU_LEVELS = {"x86-64-v3": CPU_FEATURES[:2], "x86-64-v4": CPU_FEATURES[:5]}
"""What the levels of the x86-64 psABI (section 3.1.1) have of them. Kernels need the first at least."""


class TargetError(IngotError):
    """The target is unknown, or an artifact's target is not this machine's."""


class Target(msgspec.Struct, frozen=True, omit_defaults=True):
    """`isa` must match the machine (a mismatch is refused); `device` is a profile for tuning (a mismatch is reported)."""

    kind: str  # "cpu" or "cuda"
    isa: str  # "sm_90", or "x86-64:avx2+fma+…"
    device: str  # "NVIDIA H200", "AMD EPYC"; "" when it was compiled for no device in particular
    num_threads: int = 0  # of a CPU: the threads that kernels divide their work between; 0: decided when it runs

    @property
    def arch(self) -> int:
        """90 for sm_90."""
        return int(self.isa.removeprefix("sm_"))

    @property
    def features(self) -> frozenset[str]:
        """The CPU features in `isa`."""
        return frozenset(self.isa.partition(":")[2].split("+")) - {""}

    def runs_on(self, machine: Target | None) -> bool:
        """Whether kernels for this target run on a machine's CPU or GPU: cubins need their architecture, CPU code its features."""
        if machine is None or self.kind != machine.kind:
            return False
        return self.isa == machine.isa if self.kind == "cuda" else self.features <= machine.features

    def __str__(self) -> str:
        return f"{self.kind}/{self.isa}" + (f" ({self.device})" if self.device else "")


@functools.cache
def host() -> Target:
    """This machine's CPU."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise TargetError(f"Ingot runs on Linux x86-64; this is {platform.system()} {platform.machine()}")
    with open("/proc/cpuinfo") as f:
        info = f.read()
    flags = set((re.search(r"^flags\s*:\s*(.*)$", info, re.M) or [""])[1].split())
    model = (re.search(r"^model name\s*:\s*(.*)$", info, re.M) or ["", ""])[1].strip()
    return Target("cpu", "x86-64:" + "+".join(f for f in CPU_FEATURES if f in flags), model)


def gpu() -> Target | None:
    """This machine's first GPU, or None."""
    device = first_device()
    return None if device is None else Target("cuda", "sm_{}{}".format(*device.capability), device.name)


def here(kind: str) -> Target | None:
    """This machine's device of a kind: its CPU, or its first GPU if there is one."""
    return gpu() if kind == "cuda" else host()


def resolve(name: str) -> Target:
    """`auto` (the GPU if there is one, else the CPU), `cpu` (this one), or what need not be here: `sm_<n>`, `x86-64-v<n>`, `cpu:avx2+fma+…`."""
    if name == "auto":
        return gpu() or host()
    if name == "cpu":
        return host()
    if name in GPU_ARCHES:
        present = gpu()
        return present if present is not None and present.isa == name else Target("cuda", name, "")
    if name in CPU_LEVELS:
        return Target("cpu", "x86-64:" + "+".join(CPU_LEVELS[name]), "")
    if name.startswith("cpu:"):
        return _cpu(name, set(name.removeprefix("cpu:").split("+")))
    raise TargetError(f"unknown target {name!r}: use auto, cpu, {', '.join((*CPU_LEVELS, *GPU_ARCHES))}, or cpu:FEATURE+… of {', '.join(CPU_FEATURES)}")


def _cpu(name: str, features: set[str]) -> Target:
    """A CPU by its features, in the order of CPU_FEATURES."""
    if unknown := sorted(features - set(CPU_FEATURES)):
        raise TargetError(f"target {name!r}: {', '.join(map(repr, unknown))} is no feature that kernels ask about; they are {', '.join(CPU_FEATURES)}")
    needed = CPU_LEVELS["x86-64-v4" if any(f.startswith("avx512") for f in features) else "x86-64-v3"]
    if missing := [f for f in needed if f not in features]:
        raise TargetError(f"target {name!r} lacks {', '.join(missing)}, which every CPU with the others has and kernels use; add {'+'.join(missing)}")
    return Target("cpu", "x86-64:" + "+".join(f for f in CPU_FEATURES if f in features), "")


def check_runs_here(target: Target, build_command: str) -> None:
    """TargetError, with both names and the command that builds the right artifact, unless this machine runs `target`."""
    machine = here(target.kind)
    if machine is None:
        raise TargetError(f"the artifact is for {target}, and this machine has no CUDA device ({host()}); build one for it with: {build_command}")
    if not target.runs_on(machine):
        raise TargetError(f"the artifact is for {target}, this machine is {machine}; build one for it with: {build_command}")
