"""`weft`, or `python -m cli` from a bare clone: wiring only, one module per command."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.artifacts import artifacts
from cli.bench import bench
from cli.chat import chat
from cli.demo.command import demo
from cli.generate import generate
from cli.jobs import jobs
from cli.models import models
from cli.plan import plan
from cli.quantize import export_artifact, import_checkpoint, quantize
from weft import __version__

app = typer.Typer(
    name="weft",
    help="Quantize models, talk to a gateway, look after artifacts, work out what fits on a device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(chat)
app.command()(models)
app.command()(plan)
app.command()(demo)
_PASSES_FLAGS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_PASSES_FLAGS_ON)(quantize)
app.command("import", context_settings=_PASSES_FLAGS_ON)(import_checkpoint)
app.command("export", context_settings=_PASSES_FLAGS_ON)(export_artifact)
app.add_typer(bench, name="bench")
app.add_typer(jobs, name="jobs")
app.add_typer(artifacts, name="artifacts")


def show_version(is_wanted: bool) -> None:
    """Print the version and leave."""
    if is_wanted:
        typer.echo(f"weft {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `weft` itself."""


def main() -> None:
    """The console script's entry point."""
    app()


if __name__ == "__main__":
    main()
