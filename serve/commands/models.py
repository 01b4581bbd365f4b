"""ingot models: which architectures are supported, as the oracle found."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def models_command(
    names: Annotated[list[str] | None, typer.Argument(help="With --run: architectures or model types; all of them when none is given.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Try them now instead of reading what shipped.")] = False,
    save: Annotated[bool, typer.Option("--save", help="With --run: write models/admitted.json and models/ARCHITECTURES.md of this checkout.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """List the architectures that were admitted, and why the others were not."""
    if names and not run:
        raise typer.BadParameter("names go with --run", param_hint="NAMES")
    if save and not run:
        raise typer.BadParameter("it goes with --run", param_hint="--save")
    from ingot.models import oracle

    verdicts = oracle.run(names or None) if run else [*oracle.load("forward"), *oracle.load("embed")]
    if save:
        oracle.save(verdicts)
    if as_json:
        fields = ("architecture", "model_type", "entry_point", "admitted", "reason")
        print(json.dumps([{f: getattr(v, f) for f in fields} for v in verdicts]))
        return
    width = max((len(v.architecture) for v in verdicts), default=0)
    for verdict in sorted(verdicts, key=lambda v: (v.entry_point == "embed", not v.admitted, v.architecture)):
        outcome = "admitted" if verdict.admitted else "refused: " + " ".join(verdict.reason.split())
        print(f"{verdict.architecture:{width}}  {verdict.entry_point:7}  {outcome}")
    for entry_point, kind in (("forward", "causal language models"), ("embed", "encoders")):
        of_kind = [v for v in verdicts if v.entry_point == entry_point]
        if of_kind:
            print(f"{sum(v.admitted for v in of_kind)} of {len(of_kind)} {kind} admitted")
