"""`ingot bench startup`: from the start of a process to its first token, each time a new one: of `ingot generate`, or of a server."""

from __future__ import annotations

import http.client
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ingot.artifacts.artifact import Artifact
from ingot.ops.errors import IngotError


class StartFailed(IngotError):
    """The process that was to be timed did not start, or did not answer."""


def run(path: Path, repeats: int, server: bool, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Medians in seconds: `ready` when requests are taken, `first_token`, and the stages of the process that runs the engine until it is ready.

    The first run may read a cold disk: it is given apart.
    """
    runs = []
    for i in range(repeats + 1):
        progress(f"start {i + 1} of {repeats + 1}", i / (repeats + 1))
        runs.append((_serve if server else _generate)(path))
    stages = {name: statistics.median(r["stages"].get(name, 0.0) for r in runs[1:]) for name in runs[-1]["stages"]}
    medians = {name: statistics.median(r[name] for r in runs[1:]) for name in ("ready", "first_token")}
    first = {name: runs[0][name] for name in medians}
    nbytes = Artifact.open(path).manifest.weight_bytes
    return {
        "artifact": str(path),
        "process": "serve" if server else "generate",
        "seconds": medians,
        "stages": stages,
        "first_run_seconds": first,
        "weight_bytes": nbytes,  # 0 when weights are made from seeds
        "weights_gb_per_s": nbytes / 1e9 / stages["load weights"] if nbytes else None,
    }


def _generate(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "ingot.serve.cli", "generate", str(path), "--prompt-ids", "1,2,3", "--max-tokens", "1", "--ignore-eos", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise StartFailed(f"{' '.join(command[2:])} failed: {done.stderr.strip()}")
    timing = json.loads(done.stdout)["timing"]
    return {"ready": timing["ready"], "first_token": timing["ready"] + timing["first_token"], "stages": timing["stages"]}


def _serve(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "ingot.serve.cli", "serve", str(path), "--port", "0"]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stderr is not None
        found = re.match(r"ready: http://([\d.]+):(\d+) ", server.stdout.readline())
        ready = time.perf_counter() - begin
        if found is None:
            raise StartFailed(f"{' '.join(command[2:])} failed: {server.stderr.read().strip()}")
        connection = http.client.HTTPConnection(found[1], int(found[2]), timeout=60)
        body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 1, "ignore_eos": True, "temperature": 0})
        answer = _ask(connection, "POST", "/v1/completions", body)
        first_token = time.perf_counter() - begin
        if '"finish_reason":"length"' not in answer:
            raise StartFailed(f"the server did not generate: {answer}")
        text = _ask(connection, "GET", "/metrics")
        connection.close()
        server.send_signal(signal.SIGTERM)
        server.communicate()
    stages = {name: float(value) for name, value in re.findall(r'(?m)^ingot_engine_start_seconds\{stage="(.*)"\} (\S+)$', text)}
    return {"ready": ready, "first_token": first_token, "stages": stages}


def _ask(connection: http.client.HTTPConnection, method: str, path: str, body: str | None = None) -> str:
    connection.request(method, path, body, {"content-type": "application/json"})
    return connection.getresponse().read().decode()
