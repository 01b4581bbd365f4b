"""Load a cubin and launch it through the CUDA driver: no compiler, no Triton, nothing on the way but ctypes.

`cuda-bindings` is imported on the first load, so that machines without a GPU do not need it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ingot.ops.errors import IngotError

from .plan import Kernel

HIDDEN_PARAMETERS = 2
"""Triton appends two scratch pointers to every kernel; ours use neither, so both are null."""
STATIC_SHARED_LIMIT = 48 << 10


class LaunchError(IngotError):
    """A cubin cannot be loaded, or a launch does not fit the kernel's parameters or the device."""


@dataclass(frozen=True)
class Launcher:
    """A kernel with its arguments and grid in place. The caller keeps the tensors alive."""

    function: CudaFunction
    grid: tuple[int, int, int]
    parameters: int  # address of a void*[]: one address a parameter, each into `storage`
    storage: Any
    config: Any  # CUlaunchConfig of a kernel that may overlap with its predecessor, else None

    def launch(self, stream: int) -> None:
        """Enqueue on a CUDA stream (its address); an empty grid enqueues nothing. LaunchError if the driver refuses."""
        if 0 in self.grid:
            return
        f = self.function
        if self.config is not None:
            self.config.hStream = stream
            result = f.driver.cuLaunchKernelEx(self.config, f.handle, self.parameters, 0)
        else:
            result = f.driver.cuLaunchKernel(f.handle, *self.grid, f.num_threads, 1, 1, f.shared_bytes, stream, self.parameters, 0)
        if result[0] != 0:
            raise LaunchError(f"{f.name}: launching a grid of {self.grid} failed: {_describe(f.driver, result[0])}")


@dataclass(frozen=True)
class CudaFunction:
    """A loaded kernel. `parameter_sizes` in bytes, as the cubin declares them, without the hidden ones."""

    name: str
    driver: Any
    module: Any
    handle: Any
    num_threads: int
    shared_bytes: int
    launch_pdl: bool
    parameter_sizes: tuple[int, ...]
    device: int = 0

    def prepare(self, args: Sequence[torch.Tensor | int | float], grid: Sequence[int]) -> Launcher:
        """Lay out `args` (a tensor is passed as its address) for a grid of up to three axes. LaunchError if they do not fit."""
        if len(args) != len(self.parameter_sizes):
            raise LaunchError(f"{self.name} takes {len(self.parameter_sizes)} arguments, got {len(args)}: the plan and the cubin are of different compilations")
        values = [_pack(self.name, i, a, size) for i, (a, size) in enumerate(zip(args, self.parameter_sizes, strict=True))]
        values += [ctypes.c_void_p(0)] * HIDDEN_PARAMETERS
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        x, y, z = (*grid, 1, 1, 1)[:3]
        config = _overlapping(self, (x, y, z)) if self.launch_pdl else None
        return Launcher(self, (x, y, z), ctypes.addressof(addresses), (addresses, values), config)

    def bind(self, args: Sequence[Any], grid: tuple[int, ...]) -> Callable[[], None]:
        """A function that launches on torch's current stream."""
        launcher, device = self.prepare(args, grid), self.device
        # torch.cuda.current_stream makes an object, which takes longer than the launch
        return lambda: launcher.launch(torch._C._cuda_getCurrentRawStream(device))


def bind_copy(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    """A function that enqueues a copy on torch's current stream, in a quarter of the time that torch takes to. LaunchError if the driver refuses it.

    Rows [.., N] of equal shape and type, dense each, at any pitch; host memory is page-locked. The caller keeps both alive.
    """
    driver, device = _driver(), torch.cuda.current_device()
    width, height = source.shape[-1] * source.itemsize, source.numel() // max(source.shape[-1], 1)
    assert target.shape == source.shape and target.dtype == source.dtype
    if not source.numel():
        return lambda: None
    if source.is_contiguous() and target.is_contiguous():
        to, of, nbytes = driver.CUdeviceptr(target.data_ptr()), driver.CUdeviceptr(source.data_ptr()), width * height
        enqueue = lambda stream: driver.cuMemcpyAsync(to, of, nbytes, stream)
    else:
        copy = driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_UNIFIED
        copy.srcDevice, copy.srcPitch = source.data_ptr(), source.stride(0) * source.itemsize
        copy.dstDevice, copy.dstPitch = target.data_ptr(), target.stride(0) * target.itemsize
        copy.WidthInBytes, copy.Height = width, height
        enqueue = lambda stream: driver.cuMemcpy2DAsync(copy, stream)

    def run() -> None:
        result = enqueue(torch._C._cuda_getCurrentRawStream(device))
        if result[0] != 0:
            raise LaunchError(f"copying {width * height} bytes failed: {_describe(driver, result[0])}")

    return run


def load(kernel: Kernel, path: Path) -> CudaFunction:
    """Load the cubin at `path` into torch's CUDA context. LaunchError if the driver refuses it.

    Load before the memory is nearly full: a module's first load then takes very long.
    """
    driver = _driver()
    module = _checked(driver, f"loading {path}", driver.cuModuleLoadData(path.read_bytes()))
    handle = _checked(driver, f"{path}: looking up {kernel.symbol}", driver.cuModuleGetFunction(module, kernel.symbol.encode()))
    if kernel.shared_bytes > STATIC_SHARED_LIMIT:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver, f"{kernel.name}: asking for {kernel.shared_bytes} bytes of shared memory",
                 driver.cuFuncSetAttribute(handle, attribute, kernel.shared_bytes))  # fmt: skip
    sizes: list[int] = []
    while (found := driver.cuFuncGetParamInfo(handle, len(sizes)))[0] == 0:
        sizes.append(found[2])
    return CudaFunction(kernel.name, driver, module, handle, 32 * kernel.num_warps, kernel.shared_bytes, kernel.launch_pdl,
                        tuple(sizes[:-HIDDEN_PARAMETERS]), torch.cuda.current_device())  # fmt: skip


def _pack(name: str, index: int, arg: torch.Tensor | int | float, size: int) -> Any:
    if isinstance(arg, torch.Tensor) and size == 8:
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, int) and size == 4:
        return ctypes.c_int32(arg)
    if isinstance(arg, float) and size == 4:
        return ctypes.c_float(arg)
    raise LaunchError(f"{name}: argument {index} is a {type(arg).__name__}, the cubin expects {size} bytes there")


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise LaunchError("running a GPU artifact needs the package cuda-bindings: pip install 'ingot[cuda]'") from error
    if not torch.cuda.is_available():
        raise LaunchError("this machine has no usable CUDA device: check nvidia-smi")
    torch.cuda.synchronize()  # makes torch's context, which modules are loaded into
    return driver


def _overlapping(function: CudaFunction, grid: tuple[int, int, int]) -> Any:
    """Programmatic dependent launch: the kernel may start before its predecessor on the stream ends, and waits where it says so."""
    attribute = function.driver.CUlaunchAttribute()
    attribute.id = function.driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = function.driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = function.num_threads, 1, 1
    config.sharedMemBytes, config.attrs, config.numAttrs = function.shared_bytes, [attribute], 1
    return config


def _checked(driver: Any, doing: str, result: tuple[Any, ...]) -> Any:
    if result[0] != 0:
        raise LaunchError(f"{doing} failed: {_describe(driver, result[0])}")
    return result[1] if len(result) > 1 else None


def _describe(driver: Any, code: Any) -> str:
    return driver.cuGetErrorString(code)[1].decode()
