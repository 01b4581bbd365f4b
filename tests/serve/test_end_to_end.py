"""The bundled model through the command line and over HTTP, as a stranger would run it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from ingot.artifacts.artifact import Artifact
from ingot.serve.bench.floor import Floor

FLAGS = ("--target", "cpu", "--dtype", "float32", "--max-num-seqs", "4", "--max-num-batched-tokens", "16")
PROMPT = "import os\nimport sys\n\n\ndef main():\n"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def env(shared_home: Path) -> dict[str, str]:
    return os.environ | {"INGOT_HOME": str(shared_home), "INGOT_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def ingot(env: dict[str, str]) -> Run:
    def run(*args: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, "-m", "ingot.serve.cli", *map(str, args)], env=env, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def generated(ingot: Run) -> dict[str, object]:
    """The first run of all, which compiles."""
    done = ingot("generate", "bundled", *FLAGS, "--prompt", PROMPT, "--max-tokens", 24, "--logprobs", 2, "--prompt-logprobs", 0, "--json")
    assert "compiling bundled: " in done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def artifact(ingot: Run, generated: dict[str, object]) -> Path:
    built = json.loads(ingot("compile", "bundled", *FLAGS, "--json").stdout)
    assert built["hit"]
    assert built["report"]["nodes"][0][0] == "traced"
    return Path(built["path"])


def test_generate_compiles_on_a_miss_and_finds_it_afterwards(ingot: Run, generated: dict[str, object], artifact: Path) -> None:
    again = ingot("generate", "bundled", *FLAGS, "--prompt-ids", ",".join(map(str, generated["prompt_token_ids"])), "--max-tokens", 24, "--json")  # type: ignore[call-overload]
    assert "compiling" not in again.stderr
    second = json.loads(again.stdout)
    assert second["token_ids"] == generated["token_ids"]
    assert second["text"] == generated["text"]
    assert len(second["token_ids"]) == 24
    assert (second["finish_reason"], second["logprobs"], second["prompt_logprobs"]) == ("length", None, None)
    assert second["timing"]["ready"] > 0
    assert 0 < second["timing"]["first_token"] <= second["timing"]["total"]


def test_prompt_logprobs_are_those_of_generation(ingot: Run, generated: dict[str, object], artifact: Path) -> None:
    prompt, tokens = generated["prompt_token_ids"], generated["token_ids"]
    assert isinstance(prompt, list) and isinstance(tokens, list)
    ids = ",".join(map(str, prompt + tokens))
    scored = json.loads(ingot("generate", artifact, "--prompt-ids", ids, "--max-tokens", 1, "--prompt-logprobs", 0, "--json").stdout)
    assert scored["prompt_logprobs"][0] is None
    assert scored["prompt_logprobs"][1 : len(prompt)] == pytest.approx(generated["prompt_logprobs"][1:], abs=1e-3)  # type: ignore[index]
    assert scored["prompt_logprobs"][len(prompt) :] == pytest.approx(generated["logprobs"], abs=1e-3)


def test_without_json_the_text_alone_is_printed(ingot: Run, generated: dict[str, object], artifact: Path) -> None:
    assert ingot("generate", artifact, "--prompt", PROMPT, "--max-tokens", 24).stdout == f"{generated['text']}\n"


@pytest.fixture(scope="module")
def served(env: dict[str, str], artifact: Path) -> Iterator[tuple[str, list[str], subprocess.Popen[str]]]:
    """URL, stderr so far, process of a server whose processes both report every import."""
    command = [sys.executable, "-m", "ingot.serve.cli", "serve", str(artifact), "--port", "0", "--max-model-len", "512"]
    process = subprocess.Popen(command, env=env | {"PYTHONPROFILEIMPORTTIME": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=errors.extend, args=(process.stderr,))
    reader.start()
    ready = re.match(r"ready: (http://\S+) serves bundled after", process.stdout.readline())
    assert ready, errors
    yield ready[1], errors, process
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    reader.join()
    process.stdout.close()
    process.stderr.close()


def test_http_answers_as_generate_does(served: tuple[str, list[str], object], generated: dict[str, object]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    with httpx.Client(base_url=served[0], timeout=60) as http:
        answer = http.post("/v1/completions", json=body).json()["choices"][0]
        assert (answer["token_ids"], answer["text"]) == (generated["token_ids"], generated["text"])
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
        assert "".join(e["choices"][0]["text"] for e in events) == generated["text"]
        chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "def f(x):"}], "max_tokens": 8}).json()
        assert chat["usage"]["completion_tokens"] <= 8
        too_long = http.post("/v1/completions", json={"prompt": [5] * 512})
        assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_serving_imports_no_compiler(served: tuple[str, list[str], subprocess.Popen[str]]) -> None:
    """Runs last: it stops the server, so that everything that either process ever imported has been told."""
    url, errors, process = served
    assert httpx.post(f"{url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 4, "temperature": 0.7}, timeout=60).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    imported = {line.rsplit("|", 1)[1].strip() for line in errors if line.startswith("import time:")}
    assert {"ingot.serve.server", "ingot.runtime.executor", "torch"} <= imported
    forbidden = ("transformers", "triton", "tvm", "sympy", "numba", "torch._inductor", "torch._dynamo", "ingot.compiler", "ingot.models")
    assert [m for m in sorted(imported) if m.startswith(tuple(f"{f}." for f in forbidden)) or m in forbidden] == []


def test_bench_gives_figures_beside_floors(ingot: Run, artifact: Path) -> None:
    shown = json.loads(ingot("bench", "latency", artifact, "--batch", "1,5", "--prefill", "33,4096", "--repeats", 1, "--json").stdout)
    step, skipped = shown["decode"]
    # rates and times are measured one after the other, on a machine that has other work: of the right size is all that can be said
    assert 0 < step["floor_ms"] < 3 * step["ms"]
    assert step["fraction_of_floor"] == pytest.approx(step["floor_ms"] / step["ms"])
    assert "at most 4 sequences" in skipped["skipped"]
    assert 0 < shown["prefill"][0]["floor_ms"] < 3 * shown["prefill"][0]["ms"]
    assert "the context is" in shown["prefill"][1]["skipped"]
    weights = json.loads((artifact / "manifest.json").read_text())["model"]["num_parameters"] * 4
    assert shown["weight_bytes_per_step"] == pytest.approx(weights, rel=0.01)  # the LM head is the embedding, and read whole
    assert shown["rates"] == "measured"
    of_logits = [p for p in Floor.of(Artifact.open(artifact)).products if p.rows == {"R": 1}]
    assert len(of_logits) == 4, "the LM head, and of the last layer's products in prompts those behind its attention"
    load = json.loads(ingot("bench", "throughput", artifact, "--requests", 9, "--shortest", 3, "--longest", 17, "--json").stdout)
    assert load["output_tokens_per_second"] == pytest.approx(load["output_tokens"] / load["seconds"])
    assert 9 * 3 <= load["output_tokens"] <= 9 * 17
    assert 0 < load["output_tokens_per_second"] < 3 * load["floor_output_tokens_per_second"]
    for flags in ((), ("--server",)):
        start = json.loads(ingot("bench", "startup", artifact, "--repeats", 1, *flags, "--json").stdout)
        assert 0 < start["seconds"]["ready"] < start["seconds"]["first_token"]
        assert {"python", "import torch", "import Ingot", "check the artifact", "load kernels", "load weights"} <= set(start["stages"])
        assert 0 < sum(start["stages"].values()) < start["seconds"]["ready"] + 0.1
        assert start["weights_gb_per_s"] == pytest.approx(start["weight_bytes"] / 1e9 / start["stages"]["load weights"])
