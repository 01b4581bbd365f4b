"""The CUDA driver by ctypes: what has to be known of a GPU, or can be begun on it, before torch is there (importing it takes seconds)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


@dataclass(frozen=True)
class Device:
    """A GPU: its name, and its compute capability."""

    name: str
    capability: tuple[int, int]


@functools.cache
def first_device() -> Device | None:
    """The first GPU that this process may use (CUDA_VISIBLE_DEVICES counts); None without one, without a driver, or with a torch that is for CPUs."""
    driver = _driver()
    if driver is None or not _torch_has_cuda():
        return None
    handle, name, value = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(handle), 0) or driver.cuDeviceGetName(name, len(name), handle):
        return None
    capability = []
    for attribute in (_MAJOR, _MINOR):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle):
            return None
        capability.append(value.value)
    return Device(name.value.decode(), (capability[0], capability[1]))


def make_context() -> None:
    """Make the first GPU's primary context, which torch will use; from a thread, because the driver takes a good part of a second.

    That it cannot be made is told by torch, which tries again.
    """
    driver = _driver()
    if driver is not None and _torch_has_cuda():
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuDeviceGet(ctypes.byref(handle), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)


@functools.cache
def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return re.search(r"(?m)^cuda\b[^=\n]*= *['\"]", (Path(spec.origin).parent / "version.py").read_text()) is not None
