"""ingot compile: a model in, an artifact out."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..flags import CompileFlags, takes_compile_flags


@takes_compile_flags
def compile_command(
    flags: CompileFlags,
    model: Annotated[str, typer.Argument(help="A folder with config.json, a Hugging Face id, or “bundled”.")] = "bundled",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also copy the artifact to this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print path, key and report as JSON.")] = False,
) -> None:
    """Compile a model for a target, unless the store has it already."""
    from ingot.ops.garbage import uncollected

    from ..process import age
    from ..progress import StageBar, print_seconds

    with uncollected():
        from ingot.compiler.warm_up import warm_up
        from ingot.ops.target import resolve

        warm_up(resolve(flags.target or "auto"))  # while torch and transformers are imported
        from ingot.artifacts.artifact import Artifact
        from ingot.artifacts.gate_record import notice
        from ingot.models.lean import lean

        with lean():
            from ingot.compiler.build import CompileOptions, compile_model
    gc.freeze()  # modules stay
    imported = age()
    with StageBar(f"compiling {model}") as bar:
        built = compile_model(model, CompileOptions(**flags.given), output=output, progress=bar.update)
    report = built.report or Artifact.open(built.path).manifest.report
    if as_json:
        print(json.dumps({"path": str(built.path), "key": built.key, "hit": built.hit, "report": report}))
    else:
        print(f"{'found' if built.hit else 'compiled'} in {age():.1f} s: {built.path}")
        if not built.hit:
            spent = {"imports": imported} | {stage: s for stage, s in report["seconds"].items() if stage != "total"}
            packing = {"weights": f"packed at {report['weights_gb_per_s']:.1f} GB/s"} if report["weights_gb_per_s"] >= 0.05 else {}
            print_seconds(dict(sorted(spent.items(), key=lambda stage: -stage[1])), packing)
        if missing := notice(Artifact.open(built.path)):
            print(f"ingot: {missing}", file=sys.stderr)
