"""The command line. Each verb is a file in `commands` and imports what is heavy when it runs, so that `--help` is instant."""

from __future__ import annotations

import sys

import typer

from ingot.ops.errors import IngotError

from .commands import artifacts, bench, compile, embed, export, generate, inspect, models, serve, tune

app = typer.Typer(
    name="ingot",
    help="Compile a language model once for a GPU or CPU, and serve it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compile")(compile.compile_command)
app.command("tune")(tune.tune_command)
app.command("inspect")(inspect.inspect_command)
app.command("models")(models.models_command)
app.command("generate")(generate.generate_command)
app.command("embed")(embed.embed_command)
app.command("export")(export.export_command)
app.command("serve")(serve.serve_command)
app.add_typer(bench.app, name="bench")
app.add_typer(artifacts.app, name="artifacts")


def main() -> None:
    """Run the command line: exit code 1 for an IngotError, told in one message on stderr, 2 for wrong usage."""
    try:
        app()
    except IngotError as error:
        print(f"ingot: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
