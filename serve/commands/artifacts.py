"""ingot artifacts: the store, listed, checked, cleaned, and moved to other machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.settings import settings
from ingot.artifacts.store import Store
from ingot.ops.errors import IngotError
from ingot.ops.target import here

app = typer.Typer(help="The store: list, verify, clean, export and import artifacts.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="ARTIFACT", help="An artifact's folder or key.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _store() -> Store:
    return Store(settings().home)


@app.command("list")
def list_artifacts(as_json: Json = False) -> None:
    """List what the store holds."""
    listed = _store().list()
    rows: list[dict[str, Any]] = [
        {
            "key": a.key,
            "path": str(a.path),
            "bytes": a.nbytes,
            "model": a.manifest.model.name if a.manifest else None,
            "target": str(a.manifest.target) if a.manifest else None,
            "dtype": a.manifest.options.dtype if a.manifest else None,
            "problem": a.problem or None,
        }
        for a in listed
    ]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        what = f"damaged: {row['problem']}" if row["problem"] else f"{row['model']}, {row['dtype']}, {row['target']}"
        print(f"{str(row['key'])[:16]}  {row['bytes'] / 1e6:10,.1f} MB  {what}")


@app.command()
def verify(
    artifacts: Annotated[list[str] | None, typer.Argument(help="Folders or keys; all of the store when none is given.")] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Also compare each kernel with its reference here; recorded beside the artifact.")] = False,
) -> None:
    """Check every byte of artifacts against their manifests; exit code 1 if one is damaged, or a kernel fails its gate."""
    store = _store()
    bad = 0
    for name in artifacts or [a.key for a in store.list()]:
        try:
            artifact = store.open(name)
            artifact.verify()
            found = _gate(artifact, must=bool(artifacts)) if gate else ""
            print(f"{name}: good{found}")
        except IngotError as error:
            bad += 1
            print(f"{name}: {error}")
    raise typer.Exit(min(bad, 1))


def _gate(artifact: Artifact, must: bool) -> str:
    """Run the gate and say what it found; unless it `must`, an artifact for another machine is left alone."""
    from ingot.artifacts.gate import run
    from ingot.artifacts.gate_record import refuse_failed

    from ..progress import StageBar

    target = artifact.manifest.target
    if not must and not target.runs_on(here(target.kind)):
        return f"; its gate needs {target}"
    with StageBar(f"comparing kernels of {artifact.manifest.model.name}") as bar:
        record = run(artifact, lambda done, of: bar.update("gate", done / max(of, 1)))
    refuse_failed(artifact)
    return f"; {len(record.errors)} kernels agree with their references on {record.device}, worst error {max(record.errors.values(), default=0.0):.1e}"


@app.command()
def gc(as_json: Json = False) -> None:
    """Remove what killed compilers left behind and what no artifact uses."""
    from ..resolve import forget_removed

    collected = _store().gc()
    forget_removed()
    if as_json:
        print(json.dumps({"folders": collected.folders, "blobs": collected.blobs, "bytes": collected.nbytes}))
    else:
        print(f"freed {collected.nbytes / 1e6:,.1f} MB: {collected.blobs} files, {collected.folders} unfinished artifacts")


@app.command()
def remove(artifacts: Annotated[list[str], typer.Argument(help="Keys.")]) -> None:
    """Remove artifacts; `gc` then frees what they alone used."""
    store = _store()
    for key in artifacts:
        store.remove(key)


@app.command()
def export(artifact: Name, file: Annotated[Path, typer.Argument(help="The tar to write.")]) -> None:
    """Write an artifact as one file, to be imported on another machine."""
    _store().export(artifact, file)
    print(f"{file}: {file.stat().st_size:,} bytes")


@app.command("import")
def import_artifact(file: Annotated[Path, typer.Argument(help="What `export` wrote.")]) -> None:
    """Take an exported artifact into the store."""
    print(_store().import_(file))
