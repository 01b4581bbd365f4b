"""A POST whose answer is a stream of server-sent events, over asyncio alone: a client that takes little of the CPU that it shares with a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from ingot.ops.errors import IngotError

LINE_BYTES = 1 << 20


class RequestFailed(IngotError):
    """The server could not be reached, refused the request, or broke off."""


@dataclass(frozen=True)
class Endpoint:
    """A server's address, with or without /v1, and the key that it asks for."""

    url: str
    api_key: str | None = None

    async def get(self, path: str) -> bytes:
        """The body of a GET. Raises RequestFailed."""
        async with self._exchange("GET", path, b"") as (reader, chunked):
            return b"".join([part async for part in _parts(reader, chunked)])

    async def events(self, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """The data of each event, up to the one that says [DONE]. Raises RequestFailed."""
        async with self._exchange("POST", path, body) as (reader, chunked):
            buffer, done = b"", False
            async for part in _parts(reader, chunked):
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        data = line[5:].strip()
                        done = done or data == b"[DONE]"
                        if not done:
                            yield data
            if not done:
                raise RequestFailed("the stream ended without [DONE]")

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncGenerator[tuple[asyncio.StreamReader, bool], None]:
        parts = urlsplit(self.url)
        try:
            reader, writer = await asyncio.open_connection(parts.hostname, _port(parts), ssl=parts.scheme == "https" or None, limit=LINE_BYTES)
        except OSError as error:
            raise RequestFailed(f"cannot connect to {self.url}: {error}") from error
        try:
            writer.write(self._head(method, parts, path, len(body)) + body)
            await writer.drain()
            status, headers = await _read_head(reader)
            chunked = headers.get(b"transfer-encoding") == b"chunked"
            if status != 200:
                text = await reader.read(2000) if not chunked else b"".join([p async for p in _parts(reader, True)])
                raise RequestFailed(f"HTTP {status}: {text.decode(errors='replace').strip()}")
            yield reader, chunked
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise RequestFailed(f"{self.url} broke off: {error}") from error
        finally:
            writer.close()

    def _head(self, method: str, parts: SplitResult, path: str, length: int) -> bytes:
        lines = [f"{method} {parts.path.rstrip('/').removesuffix('/v1')}{path} HTTP/1.1", f"host: {parts.netloc}", "connection: close",
                 "content-type: application/json", f"content-length: {length}"]  # fmt: skip
        if self.api_key is not None:
            lines.append(f"authorization: Bearer {self.api_key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes]]:
    status, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
    pairs = (line.partition(b":") for line in lines)
    try:
        return int(status.split(b" ", 2)[1]), {name.lower(): value.strip().lower() for name, _, value in pairs}
    except (IndexError, ValueError) as error:
        raise RequestFailed(f"not an answer of HTTP: {status[:80]!r}") from error


async def _parts(reader: asyncio.StreamReader, chunked: bool) -> AsyncGenerator[bytes, None]:
    """The body as it arrives; without chunks it ends with the connection."""
    if not chunked:
        while part := await reader.read(1 << 16):
            yield part
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
