"""`make demo`: compile the bundled model for this machine, serve it, and watch it answer through the OpenAI client."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PROMPT = "import os\nimport sys\n\n\ndef main():\n"
MAX_TOKENS = 160
INGOT = [sys.executable, "-m", "ingot.serve.cli"]


def main() -> None:
    """Compile, say what was compiled, serve, stream one completion, stop."""
    compiled = subprocess.run([*INGOT, "compile", "bundled", "--json"], stdout=subprocess.PIPE, text=True)
    if compiled.returncode:
        raise SystemExit(compiled.returncode)
    built = json.loads(compiled.stdout)
    print(_summary(built))
    with _server(built["path"]) as url:
        _stream(url)


def _summary(built: dict[str, Any]) -> str:
    report = built["report"]
    nodes = [count for _, count in report["nodes"]]
    kernels = ", ".join(f"{n} {backend}" for backend, n in report["kernels"].items() if n)
    how = "found in the store; it was compiled" if built["hit"] else "compiled"
    return f"{how} in {report['seconds']['total']:.1f} s: {nodes[0]} nodes traced, {nodes[-1]} after fusion; kernels: {kernels}\n{built['path']}"


@contextmanager
def _server(artifact: str) -> Iterator[str]:
    """The URL of a server on a free port, which is stopped afterwards."""
    process = subprocess.Popen([*INGOT, "serve", artifact, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        ready = re.match(r"ready: (\S+)", line)
        if ready is None:
            raise SystemExit(process.wait())
        print(line)
        yield ready[1]
    finally:
        process.terminate()
        process.wait()


def _stream(url: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    print(f"\n{PROMPT}", end="", flush=True)
    start = time.perf_counter()
    first, tokens = 0.0, 0
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.completions.create(model=model, prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=0.5, seed=0, **options):
        for choice in chunk.choices:
            first = first or time.perf_counter()
            print(choice.text, end="", flush=True)
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    seconds = time.perf_counter() - first
    print(f"\n\n{tokens} tokens, the first after {(first - start) * 1e3:.0f} ms, then {(tokens - 1) / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
