"""The engine's end of the socket to the server."""

from __future__ import annotations

import socket

from .messages import Command, Event, decode_command, frame, take_frames


class ServerGone(Exception):
    """The server closed its end."""


class Connection:
    """The engine's end of the socket: sends block, so that a slow server slows the engine down and nothing piles up."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()

    def send(self, event: Event) -> None:
        try:
            self._socket.sendall(frame(event))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ServerGone from error

    def receive(self, *, wait: bool) -> list[Command]:
        """The commands that have arrived; with `wait`, at least a part of one is waited for."""
        flags = 0 if wait else socket.MSG_DONTWAIT
        while True:
            try:
                data = self._socket.recv(1 << 20, flags)
            except BlockingIOError:
                break
            except ConnectionResetError as error:
                raise ServerGone from error
            if not data:
                raise ServerGone
            self._buffer += data
            flags = socket.MSG_DONTWAIT
        return [decode_command(body) for body in take_frames(self._buffer)]
