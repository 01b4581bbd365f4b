"""ingot embed: texts become vectors, in this process."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..flags import CompileFlags, takes_compile_flags


@takes_compile_flags
def embed_command(
    flags: CompileFlags,
    model_or_artifact: Annotated[str, typer.Argument(help="An encoder's artifact (folder or key), or a model, which is compiled when it was not before.")],
    text: Annotated[list[str], typer.Option("--text", help="A text; give the option again for more.", show_default=False)],
    pooling: Annotated[str | None, typer.Option(help="mean, cls or last; the artifact's own when not given.", show_default=False)] = None,
    normalize: Annotated[bool | None, typer.Option(help="Scale vectors to length 1; the artifact's own way when not given.", show_default=False)] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut a text that is too long, which is an error otherwise.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a line of numbers a text.")] = False,
) -> None:
    """Embed texts with an encoder."""
    from ..resolve import resolve

    artifact = resolve(model_or_artifact, flags)
    from ingot.runtime.embedder import Embedder

    from ..progress import StageBar

    with StageBar("loading") as bar:
        embedder = Embedder(artifact, progress=bar.update)
    ids = [embedder.encode(t, truncate=truncate) for t in text]
    vectors = embedder.embed(ids, pooling=pooling, normalize=normalize)
    if as_json:
        print(json.dumps({"model": embedder.model.name, "pooling": pooling or embedder.info.pooling, "token_ids": ids, "embeddings": vectors.tolist()}))
    else:
        for vector in vectors:
            print(" ".join(f"{x:.6g}" for x in vector))
