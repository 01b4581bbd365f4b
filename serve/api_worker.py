"""One more process that speaks HTTP for the same engine. Started by `launch.run`; ends with the server or the engine."""

from __future__ import annotations

import json
import socket
import sys

from .launch import EngineConfig, ServerConfig
from .server import serve_beside


def main() -> int:
    """`api_worker INDEX LISTENER SOCKET CONFIG`; the exit code."""
    index, listener, sock = map(int, sys.argv[1:4])
    config = json.loads(sys.argv[4])
    return serve_beside(
        ServerConfig(**config | {"engine": EngineConfig(**config["engine"])}), index, socket.socket(fileno=listener), socket.socket(fileno=sock)
    )


if __name__ == "__main__":
    sys.exit(main())
