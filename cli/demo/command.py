"""`weft demo`: the options, and whether what the services need is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.demo.run import DemoOptions, run_demo
from weft.extras import how_to_install, missing

EXTRAS = ("engine", "gateway", "quantizer")
GRPC_PORT, HTTP_PORT = 50052, 8080
MAX_PORT = 65535
EXIT_USAGE = 2
_PORT = {"min": 0, "max": MAX_PORT}


def demo(
    is_up: Annotated[
        bool,
        typer.Option("--up", help="One engine, left running in the foreground; says how to call it."),
    ] = False,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Where artifacts and logs go; a second run finds them there.")
    ] = Path(".weft"),
    listen: Annotated[
        int | None, typer.Option(metavar="PORT", help=f"gRPC port of --up ({GRPC_PORT}); 0 is any.", **_PORT)
    ] = None,
    http: Annotated[
        int | None, typer.Option(metavar="PORT", help=f"HTTP port of --up ({HTTP_PORT}); 0 is any.", **_PORT)
    ] = None,
) -> None:
    """Quantize the demo model, serve it on two engines, stream sixteen completions, kill an engine."""
    if not is_up and (listen is not None or http is not None):
        raise typer.BadParameter("--listen and --http belong to --up: without it the ports are any free ones")
    if lacking := missing(EXTRAS):
        packages = ", ".join(dict.fromkeys(name for names in lacking.values() for name in names))
        typer.echo(f"demo: not installed: {packages}; {how_to_install(list(lacking))}", err=True)
        raise typer.Exit(EXIT_USAGE)
    options = DemoOptions(
        data=data.absolute(),
        is_up=is_up,
        grpc_port=GRPC_PORT if listen is None else listen,
        http_port=HTTP_PORT if http is None else http,
    )
    raise typer.Exit(run_demo(options))
