"""ingot bench: decode latency, throughput under load, start-up."""

from __future__ import annotations

import json
import sys
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
def startup(flags: CompileFlags, name: Name, repeats: Repeats = 3, as_json: Json = False) -> None:
    """Seconds from the start of a process to its first token."""
    from ..bench import startup
    from ..progress import StageBar
    from ..resolve import resolve

    artifact = resolve(name, flags)
    with StageBar("bench startup") as bar:
        result = startup.run(artifact, repeats, bar.update)
    _show(result, as_json)


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
