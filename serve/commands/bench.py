"""ingot bench: decode latency, throughput under load, start-up, and any server over HTTP."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..flags import CompileFlags, takes_compile_flags

app = typer.Typer(help="Measure latency, throughput and start-up through the public engine.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="An artifact's folder or key, or a model, which is compiled when it was not before.")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs of which the median counts.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
@takes_compile_flags
def latency(
    flags: CompileFlags,
    name: Name,
    batch: Annotated[str, typer.Option(help="Batch sizes of the decode step.")] = "1,4,16,64,256",
    prefill: Annotated[str, typer.Option(help="Prompt lengths.")] = "1024,8192",
    repeats: Repeats = 3,
    as_json: Json = False,
) -> None:
    """The time of a decode step and of a prompt, beside what memory and arithmetic allow."""
    batches, prefills = _numbers(batch, "--batch"), _numbers(prefill, "--prefill")
    from ..bench import latency
    from ..progress import StageBar
    from ..resolve import resolve

    artifact = resolve(name, flags)
    with StageBar("bench latency") as bar:
        result = latency.run(artifact, batches, prefills, repeats, bar.update)
    _show(result, as_json)


@app.command()
@takes_compile_flags
def throughput(
    flags: CompileFlags,
    name: Name,
    requests: Annotated[int, typer.Option(min=1, help="Requests, all at once.")] = 256,
    shortest: Annotated[int, typer.Option(min=1, help="Tokens of the shortest prompt and answer.")] = 100,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt and answer.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Of lengths, prompts and sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Output tokens per second under a mixed load at temperature 0.6."""
    if shortest > longest:
        raise typer.BadParameter(f"{shortest} is more than --longest {longest}", param_hint="--shortest")
    from ..bench import throughput
    from ..progress import StageBar
    from ..resolve import resolve

    artifact = resolve(name, flags)
    with StageBar("bench throughput") as bar:
        result = throughput.run(artifact, requests, shortest, longest, seed, bar.update)
    _show(result, as_json)


@app.command()
@takes_compile_flags
def startup(
    flags: CompileFlags,
    name: Name,
    repeats: Repeats = 3,
    server: Annotated[bool, typer.Option("--server", help="Of ingot serve, over HTTP, instead of ingot generate.")] = False,
    as_json: Json = False,
) -> None:
    """Seconds from the start of a process to its first token, and what they were spent on."""
    from ..bench import startup
    from ..progress import StageBar, print_seconds
    from ..resolve import resolve

    artifact = resolve(name, flags)
    with StageBar("bench startup") as bar:
        result = startup.run(artifact, repeats, server, bar.update)
    stages = {} if as_json else result.pop("stages")
    _show(result, as_json)
    if stages:
        print_seconds(stages)


@app.command()
def serve(
    url: Annotated[str, typer.Argument(help="An OpenAI server, such as http://127.0.0.1:8000; ours or another.")],
    model: Annotated[str | None, typer.Option(help="Its name there; the first one listed by default.", show_default=False)] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many.")] = 256,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests a second, as a Poisson process; all at once by default.", show_default=False)] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="At most so many at a time.", show_default=False)] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths: 128, or uniform in 100:1024.")] = "128",
    output_tokens: Annotated[str, typer.Option(help="Answer lengths, likewise.")] = "128",
    vocab_size: Annotated[int, typer.Option(min=2, help="Random prompts are of token ids below it.")] = 32000,
    text: Annotated[bool, typer.Option("--text", help="Random words for prompts, about a token each, instead of token ids.")] = False,
    prompts: Annotated[Path | None, typer.Option(help="Prompts from a file: a JSON string, or an object with a prompt, a line.", show_default=False)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="/v1/chat/completions; implies --text.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    stop_at_eos: Annotated[bool, typer.Option("--stop-at-eos", help="Answers may end early; without it ignore_eos is asked for.")] = False,
    api_key: Annotated[str | None, typer.Option(help="What the server asks clients for.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of lengths, prompts and arrivals.")] = 0,
    as_json: Json = False,
) -> None:
    """Latencies and throughput of a server, as streaming clients see them."""
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"{url!r} does not begin with http:// or https://", param_hint="URL")
    import numpy as np

    from ..bench import serve, workload
    from ..bench.sse import Endpoint
    from ..progress import StageBar

    random = np.random.default_rng(seed)
    lengths = [workload.Lengths.parse(t).draw(random, requests) for t in (prompt_tokens, output_tokens)]
    if prompts is not None:
        asked = workload.read_prompts(prompts, requests)
    else:
        asked = workload.random_prompts(random, lengths[0], None if text or chat else vocab_size)
    calls = [workload.Call(*c) for c in zip(asked, lengths[1], workload.arrivals(random, requests, rate), strict=True)]
    load = serve.Load(Endpoint(url, api_key), model, chat, temperature, not stop_at_eos, concurrency)
    with StageBar("bench serve") as bar:
        result = serve.run(load, calls, bar.update)
    _show({"rate": rate, **result}, as_json)


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        numbers = [0]
    if any(n < 1 for n in numbers):
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers such as 1,16", param_hint=option)
    return numbers


def _show(result: dict[str, Any], as_json: bool) -> None:
    """JSON, or a line a fact and a table for each list of points."""
    if as_json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 180)
    for name, value in result.items():
        if isinstance(value, list):
            table = Table(*dict.fromkeys(k for point in value for k in point), title=name, title_justify="left")
            for point in value:
                table.add_row(*(_figure(point.get(column.header, "")) for column in table.columns))
            console.print(table)
        elif isinstance(value, dict):
            console.print(f"{name}: {', '.join(f'{k} {_figure(v)}' for k, v in value.items())}")
        else:
            console.print(f"{name}: {_figure(value)}")


def _figure(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else "" if value is None else str(value)
