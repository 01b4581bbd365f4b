"""ingot tune: which kernels are fastest on this machine's device, written down for every later compile."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from ..flags import CompileFlags, takes_compile_flags


@takes_compile_flags
def tune_command(
    flags: CompileFlags,
    models: Annotated[list[str], typer.Argument(help="Folders with config.json, Hugging Face ids, or “bundled”; weights are not needed.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The table's file; by default where this installation reads it.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Keep what the file has already, and measure what it lacks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Measure every kernel for some models, and write the tuning table of this machine's device."""
    from ingot.compiler.build import CompileOptions
    from ingot.compiler.tune import tune

    from ..progress import StageBar

    with StageBar("tuning") as bar:
        report = tune(models, CompileOptions(**flags.given), output, bar.update, add=add)
    if as_json:
        print(json.dumps(dataclasses.asdict(report) | {"path": str(report.path)}))
    else:
        print(f"{report.entries} entries in {report.path}; {len(report.rejected)} kernels rejected")
