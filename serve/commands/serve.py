"""ingot serve: the OpenAI-compatible HTTP server."""

from __future__ import annotations

from typing import Annotated

import typer

from ..flags import CompileFlags, takes_compile_flags


@takes_compile_flags
def serve_command(
    flags: CompileFlags,
    model_or_artifact: Annotated[str, typer.Argument(help="An artifact's folder or key, or a model, which is compiled when it was not before.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one; the ready line tells it.")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Ask clients for this key.", show_default=False)] = None,
    api_workers: Annotated[int, typer.Option(min=1, help="Processes that speak HTTP, in front of one engine.")] = 1,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest sequence, prompt and answer.", show_default=False)] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(min=0.05, max=1.0, help="Share of the GPU's memory to use.", show_default=False)] = None,
) -> None:
    """Serve a model over HTTP: /v1/completions, /v1/chat/completions (an encoder: /v1/embeddings), /v1/models, /health, /metrics."""
    from ..launch import EngineConfig, ServerConfig, run
    from ..resolve import resolve

    artifact = resolve(model_or_artifact, flags)
    options = {"max_model_len": max_model_len, "gpu_memory_utilization": gpu_memory_utilization}
    engine = EngineConfig(str(artifact), {k: v for k, v in options.items() if v is not None})
    raise typer.Exit(run(ServerConfig(engine, host, port, api_key, api_workers=api_workers)))
