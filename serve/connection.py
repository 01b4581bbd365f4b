"""The engine's end of the sockets to the API processes."""

from __future__ import annotations

import selectors
import socket

from .messages import Abort, Add, Command, Embed, Event, decode_command, frame, take_frames


class ClientGone(Exception):
    """An API process closed its end."""


class Connection:
    """One socket: sends block, so that a slow server slows the engine down and nothing piles up."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._buffer = bytearray()

    def send(self, event: Event) -> None:
        try:
            self.socket.sendall(frame(event))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ClientGone from error

    def receive(self) -> list[Command]:
        """The commands that have arrived."""
        while True:
            try:
                data = self.socket.recv(1 << 20, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionResetError as error:
                raise ClientGone from error
            if not data:
                raise ClientGone
            self._buffer += data
        return [decode_command(body) for body in take_frames(self._buffer)]


class Clients:
    """All API processes, and who asked for what. ClientGone is raised when the first one goes: without the server there is nothing to do."""

    def __init__(self, connections: list[Connection]) -> None:
        self.owners: dict[str, Connection] = {}
        """By request, until `forget`."""
        self._first, self._present = connections[0], dict.fromkeys(connections)
        self._selector = selectors.DefaultSelector()
        for client in connections:
            self._selector.register(client.socket, selectors.EVENT_READ, client)

    def receive(self, *, wait: bool) -> list[Command]:
        """The commands that have arrived; with `wait`, at least a part of one is waited for. What others than the first asked for is aborted when they go."""
        commands: list[Command] = []
        for key, _ in self._selector.select(None if wait else 0):
            try:
                received = key.data.receive()
            except ClientGone:
                self._leave(key.data)
                received = [Abort([r for r, owner in self.owners.items() if owner is key.data])]
            for command in received:
                if isinstance(command, Add):
                    self.owners[command.request.id] = key.data
                elif isinstance(command, Embed):
                    self.owners[command.request_id] = key.data
            commands += received
        return commands

    def send(self, client: Connection, event: Event) -> None:
        """To one of them, if it is still there."""
        if client in self._present:
            try:
                client.send(event)
            except ClientGone:
                if client is self._first:
                    raise  # of another one, `receive` will notice

    def everybody(self) -> list[Connection]:
        return list(self._present)

    def forget(self, request_id: str) -> Connection:
        """A request has ended; who asked for it."""
        return self.owners.pop(request_id)

    def _leave(self, client: Connection) -> None:
        if client is self._first:
            raise ClientGone
        del self._present[client]
        self._selector.unregister(client.socket)
        client.socket.close()
