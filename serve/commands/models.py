"""ingot models: which architectures are supported, as the oracle found."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer


def models_command(
    names: Annotated[list[str] | None, typer.Argument(help="With --run: architectures or model types; all of them when none is given.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Try them now instead of reading what shipped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """List the architectures that were admitted, and why the others were not."""
    if names and not run:
        raise typer.BadParameter("names go with --run", param_hint="NAMES")
    from ingot.models import oracle

    verdicts = oracle.run(names or None) if run else oracle.load()
    if as_json:
        fields = ("architecture", "model_type", "admitted", "reason")
        print(json.dumps([{f: asdict(v)[f] for f in fields} for v in verdicts]))
        return
    width = max((len(v.architecture) for v in verdicts), default=0)
    for verdict in sorted(verdicts, key=lambda v: (not v.admitted, v.architecture)):
        print(f"{verdict.architecture:{width}}  {'admitted' if verdict.admitted else 'refused: ' + ' '.join(verdict.reason.split())}")
    print(f"{sum(v.admitted for v in verdicts)} of {len(verdicts)} admitted")
