"""Weights on disk: packed tensors in `weights.bin`, or seeds that make them on the device.

On a CPU the file is mapped, so that processes share it and nothing is copied; on a GPU threads read it into pinned
buffers, hash and copy it, each with two buffers so that reading and copying overlap.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ingot.ops.dummy import generate
from ingot.ops.graph import Recipe

from .artifact import Artifact
from .chunks import ChunkWriter, Progress, check_chunks, damaged, map_file
from .files import AGAIN, ArtifactError
from .manifest import CHUNK_BYTES, WEIGHTS, WeightTensor
from .settings import settings

ALIGNMENT = 4096
"""Bytes: a page, which is a multiple of every vector, cache line and 256-byte rule of a GPU."""
_PIECE_BYTES = 8 << 20  # pinning memory takes 0.3 ms a MiB


def recipe_to_json(recipe: Recipe) -> list[Any]:
    """`[op, params, inputs]`, nested."""
    return [recipe.op, list(recipe.params), [recipe_to_json(i) for i in recipe.inputs]]


def recipe_from_json(data: Any) -> Recipe:
    """The recipe that `recipe_to_json` wrote; ArtifactError when it is not one."""
    match data:
        case [str(op), [*params], [*inputs]]:
            return Recipe(op, tuple(params), tuple(recipe_from_json(i) for i in inputs))
    raise ArtifactError(f"{data!r} is not a recipe [op, params, inputs]; compile the model again")


class WeightsWriter:
    """Streams tensors into weights.bin. After `close`, `nbytes` and `seconds` say what it wrote and how long that took, packing apart."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self.seconds = 0.0
        self._threads = threads
        self._chunks: ChunkWriter | None = None  # no file when every weight is a seed
        self._tensors: dict[str, WeightTensor] = {}

    @property
    def nbytes(self) -> int:
        return self._chunks.size if self._chunks is not None else 0

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / 1e9 / self.seconds if self.seconds else 0.0

    def add(self, name: str, tensor: torch.Tensor, recipe: Recipe) -> None:
        """Append a tensor of any shape, dtype and device; it may be freed afterwards."""
        start = time.perf_counter()
        self._chunks = self._chunks or ChunkWriter(self.path, self._threads)
        self._chunks.write(memoryview(bytes(-self._chunks.size % ALIGNMENT)))
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._record(name, tensor.dtype, tuple(tensor.shape), self._chunks.size, data.numel(), recipe)
        self._chunks.write(data.numpy().data)
        self.seconds += time.perf_counter() - start

    def add_seed(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], recipe: Recipe) -> None:
        """A weight that `load` generates on the device; `recipe` is Recipe("seed", (seed, mean, std))."""
        if recipe.op != "seed":
            raise ArtifactError(f"weight {name}: recipe {recipe.op!r} cannot be generated, only 'seed' can; add its tensor instead")
        self._record(name, dtype, shape, -1, 0, recipe)

    def close(self) -> tuple[tuple[WeightTensor, ...], tuple[str, ...]]:
        """Finish the file; the table of tensors and the SHA-256 of each chunk."""
        start = time.perf_counter()
        digests = self._chunks.close() if self._chunks is not None else ()
        self.seconds += time.perf_counter() - start
        return tuple(self._tensors.values()), digests

    def abort(self) -> None:
        if self._chunks is not None:
            self._chunks.abort()

    def _record(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int, nbytes: int, recipe: Recipe) -> None:
        if name in self._tensors:
            raise ArtifactError(f"{self.path}: weight {name} is added twice")
        self._tensors[name] = WeightTensor(name, str(dtype).removeprefix("torch."), shape, offset, nbytes, recipe_to_json(recipe))


def load(artifact: Artifact, device: str | torch.device, threads: int | None = None, progress: Progress | None = None) -> dict[str, torch.Tensor]:
    """Every weight by name, checked. On a CPU: views of the mapped file (writing to one faults). On a GPU: views of one allocation.

    Weights without bytes are generated from their seed. ArtifactError names weights.bin when a chunk is damaged.
    """
    device = torch.device(device)
    threads = threads or settings().num_threads
    manifest = artifact.manifest
    data = torch.empty(0, dtype=torch.uint8, device=device)
    if manifest.weight_chunks:
        data = (_map if device.type == "cpu" else _copy)(artifact, device, threads, progress)
    return {w.name: _generate(w, device) if w.offset < 0 else _view(data, w, artifact.root) for w in manifest.weights}


def _map(artifact: Artifact, device: torch.device, threads: int, progress: Progress | None) -> torch.Tensor:
    path = artifact.path(WEIGHTS)
    memory = map_file(path)
    check_chunks(path, memory, artifact.manifest.weight_chunks, threads, progress)
    with warnings.catch_warnings():
        # Torch has no read-only tensors and warns of one; that a write faults is what we want.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(memory, dtype=torch.uint8)


def _copy(artifact: Artifact, device: torch.device, threads: int, progress: Progress | None) -> torch.Tensor:
    """weights.bin on a GPU. Each thread takes the next chunk, and reads, hashes and copies it in pieces through two pinned buffers."""
    path, digests, size = artifact.path(WEIGHTS), artifact.manifest.weight_chunks, artifact.manifest.weight_bytes
    data = torch.empty(size, dtype=torch.uint8, device=device)
    allocated = torch.cuda.current_stream(device).record_event()
    indices = iter(range(len(digests)))
    done = [0] * len(digests)

    def work(fd: int) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_event(allocated)
            try:
                copy_chunks(fd, stream)
            finally:
                stream.synchronize()  # before anyone frees what is being copied

    def copy_chunks(fd: int, stream: torch.cuda.Stream) -> None:
        buffers = [torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        copied = [torch.cuda.Event(), torch.cuda.Event()]
        for index in indices:
            hasher = hashlib.sha256()
            end = min((index + 1) * CHUNK_BYTES, size)
            for turn, begin in enumerate(range(index * CHUNK_BYTES, end, _PIECE_BYTES)):
                buffer, event = buffers[turn % 2], copied[turn % 2]
                event.synchronize()
                piece = buffer[: min(_PIECE_BYTES, end - begin)]
                _read_exactly(fd, piece, begin, path)
                with torch.cuda.stream(stream):
                    data[begin : begin + len(piece)].copy_(piece, non_blocking=True)
                    event.record(stream)
                hasher.update(piece.numpy().data)
                done[index] += len(piece)
            if hasher.hexdigest() != digests[index]:
                raise damaged(path, index)
            if progress is not None:
                progress(sum(done), size)

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        count = min(threads, len(digests))
        with ThreadPoolExecutor(count) as pool:
            for future in [pool.submit(work, fd) for _ in range(count)]:
                future.result()
    finally:
        os.close(fd)
    return data


def _read_exactly(fd: int, piece: torch.Tensor, offset: int, path: Path) -> None:
    view, done = piece.numpy().data, 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise ArtifactError(f"{path} was truncated while it was read; {AGAIN}")
        done += count


def _view(data: torch.Tensor, weight: WeightTensor, root: Path) -> torch.Tensor:
    return data[weight.offset : weight.offset + weight.nbytes].view(_dtype(weight)).view(weight.shape)


def _generate(weight: WeightTensor, device: torch.device) -> torch.Tensor:
    seed, mean, std = recipe_from_json(weight.recipe).params
    return _aligned(generate(seed, mean, std, weight.shape, _dtype(weight), device))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at a multiple of ALIGNMENT bytes, as one of weights.bin is: torch's own allocator promises a CPU only 64."""
    if tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    nbytes = tensor.numel() * tensor.itemsize
    space = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=tensor.device)
    begin = -space.data_ptr() % ALIGNMENT
    return space[begin : begin + nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _dtype(weight: WeightTensor) -> torch.dtype:
    dtype = getattr(torch, weight.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"weight {weight.name} has dtype {weight.dtype!r}, which torch {torch.__version__} does not know; upgrade torch")
    return dtype
