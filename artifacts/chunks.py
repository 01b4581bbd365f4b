"""A large file in chunks of CHUNK_BYTES, each with its SHA-256, written and checked by threads (hashlib releases the GIL)."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from .files import AGAIN, ArtifactError, writing
from .manifest import CHUNK_BYTES

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class ChunkWriter:
    """Writes a new file from front to back; threads hash and store each chunk as it fills. ArtifactError when the disk is full."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self.size = 0
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._pending: deque[Future[str]] = deque()
        self._free: list[memoryview] = []
        self._buffer: memoryview | None = None
        self._digests: list[str] = []
        with writing(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, data: memoryview) -> None:
        """Append bytes; the caller may change `data` afterwards."""
        while len(data):
            if self._buffer is None:
                self._buffer = self._free.pop() if self._free else memoryview(mmap.mmap(-1, CHUNK_BYTES))
            fill = self.size % CHUNK_BYTES
            count = min(len(data), CHUNK_BYTES - fill)
            self._buffer[fill : fill + count] = data[:count]
            self.size += count
            data = data[count:]
            if fill + count == CHUNK_BYTES:
                self._submit(CHUNK_BYTES)

    def close(self) -> tuple[str, ...]:
        """Finish the file and flush it to the disk; the SHA-256 of each chunk."""
        if self._buffer is not None:
            self._submit(self.size % CHUNK_BYTES)
        while self._pending:
            self._collect()
        with writing(self.path):
            os.fsync(self._fd)
        self.abort()
        return tuple(self._digests)

    def abort(self) -> None:
        """Let go of threads and file; what was written stays for the caller to remove. May be called twice."""
        self._pool.shutdown(cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _submit(self, count: int) -> None:
        assert self._buffer is not None
        buffer, self._buffer = self._buffer, None
        # One chunk more than threads: the caller fills one while each thread stores another.
        if len(self._pending) > self._threads:
            self._collect()
        self._pending.append(self._pool.submit(self._store, buffer, count, self.size - count))

    def _collect(self) -> None:
        with writing(self.path):
            self._digests.append(self._pending.popleft().result())

    def _store(self, buffer: memoryview, count: int, offset: int) -> str:
        digest = hashlib.sha256(buffer[:count]).hexdigest()
        done = 0
        while done < count:
            done += os.pwrite(self._fd, buffer[done:count], offset + done)
        self._free.append(buffer)
        return digest


def map_file(path: Path) -> mmap.mmap:
    """A non-empty file as read-only memory that other processes share. A write to it faults."""
    with open(path, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def damaged(path: Path, index: int) -> ArtifactError:
    """The error for a chunk whose SHA-256 is not the recorded one."""
    begin = index * CHUNK_BYTES
    return ArtifactError(f"{path}: bytes {begin} to {begin + CHUNK_BYTES} are not what was written (SHA-256 differs); {AGAIN}")


def check_chunks(path: Path, memory: mmap.mmap, digests: Sequence[str], threads: int, progress: Progress | None = None) -> None:
    """Hash every chunk of `memory`, which maps `path`; ArtifactError names the first that is damaged."""
    view = memoryview(memory)

    def digest(index: int) -> str:
        return hashlib.sha256(view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]).hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        for index, actual in enumerate(pool.map(digest, range(len(digests)))):
            if actual != digests[index]:
                pool.shutdown(cancel_futures=True)
                raise damaged(path, index)
            if progress is not None:
                progress(min((index + 1) * CHUNK_BYTES, len(view)), len(view))
