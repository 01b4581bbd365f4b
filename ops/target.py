"""Target: the instruction set that an artifact's kernels are compiled for, and the device profile that they were tuned on."""

from __future__ import annotations

import functools
import platform
import re

import msgspec

from .errors import IngotError

GPU_ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHARED_MEMORY_BYTES = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
"""The most shared memory that one block may have (CUDA programming guide, technical specifications)."""
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16")
"""The features that generated code asks about, in /proc/cpuinfo's spelling."""


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
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", f"sm_{major}{minor}", torch.cuda.get_device_name())


def resolve(name: str) -> Target:
    """`auto` (the GPU if there is one, else the CPU), `cpu`, or `sm_<n>`, compiled for without needing the device."""
    if name == "auto":
        return gpu() or host()
    if name == "cpu":
        return host()
    if name in GPU_ARCHES:
        here = gpu()
        return here if here is not None and here.isa == name else Target("cuda", name, "")
    raise TargetError(f"unknown target {name!r}: use auto, cpu, or one of {', '.join(GPU_ARCHES)}")


def check_runs_here(target: Target, build_command: str) -> None:
    """TargetError, with both names and the command that builds the right artifact, unless this machine runs `target`."""
    here = gpu() if target.kind == "cuda" else host()
    if here is None:
        raise TargetError(f"the artifact is for {target}, and this machine has no CUDA device ({host()}); build one for it with: {build_command}")
    fits = here.isa == target.isa if target.kind == "cuda" else target.features <= here.features
    if not fits:
        raise TargetError(f"the artifact is for {target}, this machine is {here}; build one for it with: {build_command}")
