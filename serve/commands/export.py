"""ingot export: a model as a file that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export_command(
    model_or_artifact: Annotated[str, typer.Argument(help="A folder with config.json, a Hugging Face id, “bundled”, or an artifact (folder or key).")],
    onnx: Annotated[Path, typer.Option("--onnx", help="The file to write; much data goes to FILE.data beside it.", show_default=False)],
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run modeling code that comes with the checkpoint.")] = False,
) -> None:
    """Write a model's traced graph as ONNX, in float32."""
    from ingot.compiler.onnx.export import export_artifact, export_model

    from ..resolve import find_artifact

    artifact = find_artifact(model_or_artifact)
    if artifact is not None:
        export_artifact(artifact, onnx)
    else:
        export_model(model_or_artifact, onnx, trust_remote_code=trust_remote_code)
    print(f"wrote {onnx}")
