"""`weft bench`: put a load on a server and tell how it fared. Exit codes and files; the work is next door.

0: measured. 1: the server is not there, refuses, or answered no request whole. 2: flags that make no sense.
130: Ctrl-C; what was measured until then is reported.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cli.bench.compare import CompareError, compare_table, read_document
from cli.bench.flags import (
    OUTPUT,
    LoadOptions,
    ProtocolOptions,
    WorkloadOptions,
    make_settings,
)
from cli.bench.plot import PlotError, check_plot, write_plot
from cli.bench.run import Result
from cli.bench.run import bench as run_bench
from cli.bench.settings import Settings, SettingsError
from cli.bench.table import WIDTH, show
from cli.bench.transport import BenchError
from cli.connection import EXIT_INTERRUPTED, ConnectionOptions, fail
from cli.options import flattened

bench = typer.Typer(help="Measure a server under load; compare and plot results.", add_completion=False)
_SECRETS = ("--api-key",)


@bench.callback(invoke_without_command=True)
@flattened
def measure(
    context: typer.Context,
    load: LoadOptions,
    workload: WorkloadOptions,
    protocol: ProtocolOptions,
    connection: ConnectionOptions,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC:MS",
            help="Count answers within a limit of ttft, itl, tpot or e2e; repeatable.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all results there.", rich_help_panel=OUTPUT),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw them: .html; .png with matplotlib.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Measure a server under load."""
    if context.invoked_subcommand is not None:
        return
    try:
        settings = make_settings(load, workload, protocol, connection, goodput or [])
        for path in (json_file, plot_file):
            if path is not None and not path.parent.is_dir():
                raise SettingsError(f"there is no directory {path.parent}")
        if plot_file is not None:
            check_plot(plot_file)
    except (SettingsError, PlotError) as error:
        raise typer.BadParameter(str(error)) from error
    result = _run(settings)
    document = result.document
    if document.get("points"):
        _report(document, json_file, plot_file)
    if result.is_interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if document["failure"] is not None:
        fail(document["failure"])
    if not any(point["requests"]["ok"] for point in document["points"]):
        cancelled = sum(point["requests"]["cancelled"] for point in document["points"])
        if not cancelled:
            fail("no request was answered")


def _run(settings: Settings) -> Result:
    errors = Console(stderr=True)
    try:
        with errors.status("") as status:
            return asyncio.run(run_bench(settings, shown_command(sys.argv), status.update))
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from error
    except BenchError as error:
        fail(str(error))
        raise  # not reached: fail raises
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _report(document: dict[str, Any], json_file: Path | None, plot_file: Path | None) -> None:
    """The table first: a full disk must not cost the results."""
    show(_console(), document)
    try:
        if json_file is not None:
            json_file.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if plot_file is not None:
            write_plot(plot_file, [document])
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")


def _console() -> Console:
    return Console(width=min(WIDTH, Console().width) if sys.stdout.isatty() else WIDTH)


def shown_command(argv: Sequence[str]) -> list[str]:
    """The command line as it may be kept: without the key, and without the folder of the program, which often
    names a person.
    """
    found: list[str] = [Path(argv[0]).name] if argv else []
    for argument in argv[1:]:
        name, equals, _ = argument.partition("=")
        if found and found[-1] in _SECRETS:
            found.append("...")
        elif name in _SECRETS and equals:
            found.append(f"{name}=...")
        else:
            found.append(argument)
    return found


@bench.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="A.json", help="What to compare with.")],
    other: Annotated[Path, typer.Argument(metavar="B.json", help="What is compared.")],
    force: Annotated[bool, typer.Option("--force", help="Compare unlike workloads all the same.")] = False,
) -> None:
    """Ratios of two results of the same workload."""
    try:
        table, notes = compare_table(read_document(base), read_document(other), is_forced=force)
    except CompareError as error:
        fail(str(error))
        return
    console = _console()
    console.print(f"A {base}", f"B {other}", sep="\n", highlight=False, markup=False)
    console.print(table)
    for note in notes:
        console.print(note, style="yellow", highlight=False, markup=False)


@bench.command("show")
def show_file(result: Annotated[Path, typer.Argument(metavar="FILE.json")]) -> None:
    """The tables of a result."""
    try:
        show(_console(), read_document(result))
    except CompareError as error:
        fail(str(error))


@bench.command("plot")
def plot_files(
    results: Annotated[list[Path], typer.Argument(metavar="FILE.json...", help="Results, drawn together.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .html or .png file.")],
) -> None:
    """Draw results."""
    try:
        check_plot(out)
        write_plot(out, [read_document(path) for path in results], [path.stem for path in results])
    except PlotError as error:
        raise typer.BadParameter(str(error)) from error
    except CompareError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
