"""ingot export: a model as a file that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export_command(
    model_or_artifact: Annotated[str, typer.Argument(help="A folder with config.json, a Hugging Face id, “bundled”, or an artifact (folder or key).")],
    onnx: Annotated[bool, typer.Option("--onnx", help="As ONNX: the only form there is.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The file to write, by default MODEL.onnx here; much data goes beside it.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run modeling code that comes with the checkpoint.")] = False,
) -> None:
    """Write a model's traced graph as ONNX, in float32."""
    from ingot.compiler.onnx.export import export_artifact, export_model

    from ..resolve import find_artifact

    if not onnx:
        raise typer.BadParameter("say --onnx: a model is exported as nothing else", param_hint="--onnx")
    artifact = find_artifact(model_or_artifact)
    file = output or Path(f"{Path(model_or_artifact).name}.onnx")
    if artifact is not None:
        export_artifact(artifact, file)
    else:
        export_model(model_or_artifact, file, trust_remote_code=trust_remote_code)
    print(f"wrote {file}")
