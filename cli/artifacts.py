"""`weft artifacts`: look at the artifact volume, verify it, roll a model back, remove old versions."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.connection import EXIT_FAILURE, fail
from weft.artifact.maintenance import Removal, Version, collect, collectable, list_versions, roll_back
from weft.artifact.manifest import ArtifactError
from weft.artifact.store import ArtifactStore
from weft.config import variable

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
Volume = Annotated[
    Path | None, typer.Option("--artifacts", metavar="DIR", help="The artifact volume; else WEFT_ARTIFACTS.")
]
Model = Annotated[str, typer.Argument(help="A model of the volume.")]
AnyModel = Annotated[str | None, typer.Argument(help="A model of the volume; by default all.")]

artifacts = typer.Typer(help="Artifacts: versions, digests, rollback, removal.", no_args_is_help=True)


@artifacts.command("ls")
def list_artifacts(model: AnyModel = None, volume: Volume = None, as_json: AsJson = False) -> None:
    """List versions, newest first, with size, quality and which is CURRENT."""
    store = _store(volume)
    with _told_in_one_line():
        found = [version for name in _models(store, model) for version in list_versions(store, name)]
    if as_json:
        for version in found:
            typer.echo(json.dumps(_row(version)))
        return
    table = Table()
    for heading in ("version", "", "size", "made", "perplexity", "mean KL"):
        table.add_column(heading, no_wrap=heading == "version", overflow="fold")
    for version in found:
        row = _row(version)
        quality = f"{row['source_perplexity']:.4g} -> {row['perplexity']:.4g}" if "perplexity" in row else "-"
        divergence = f"{row['mean_kl']:.3g}" if "mean_kl" in row else "-"
        state = "broken" if version.problem else "current" if version.is_current else ""
        made = version.started[:16].replace("T", " ") or "-"
        name = f"{version.model}/{version.version}"
        cells = (name, state, _size(version.size), made, quality, divergence)
        table.add_row(*(Text(cell) for cell in cells))  # square brackets in run.json are no markup
    Console().print(table)


@artifacts.command()
def verify(
    model: AnyModel = None,
    version: Annotated[str | None, typer.Argument(help="One version; by default all.")] = None,
    volume: Volume = None,
    as_json: AsJson = False,
) -> None:
    """Compare every file with the manifest; exit status 1 when one differs, which is named."""
    store = _store(volume)
    num_bad = 0
    for name in _models(store, model):
        for candidate in [version] if version else store.versions(name):
            problem = ""
            try:
                store.verify(store.open(name, candidate))
            except (ArtifactError, OSError) as error:
                problem, num_bad = " ".join(str(error).split()), num_bad + 1
            if as_json:
                row = {"model": name, "version": candidate, "is_sound": not problem, "problem": problem}
                typer.echo(json.dumps(row))
            else:
                typer.echo(f"{name}/{candidate}: {problem or 'sound'}", err=bool(problem))
    if num_bad:
        raise typer.Exit(EXIT_FAILURE)


@artifacts.command()
def rollback(
    model: Model,
    version: Annotated[str | None, typer.Argument(help="By default what was CURRENT before.")] = None,
    volume: Volume = None,
    as_json: AsJson = False,
) -> None:
    """Point CURRENT at another version, once all its files are verified. Engines load it when they start."""
    with _told_in_one_line():
        before, after = roll_back(_store(volume), model, version)
    if as_json:
        typer.echo(json.dumps({"model": model, "from": before, "to": after}))
    else:
        typer.echo(f"{model}: CURRENT is {after}" + ("" if before == after else f", was {before}"))


@artifacts.command("gc")
def collect_garbage(
    model: AnyModel = None,
    volume: Volume = None,
    keep: Annotated[int, typer.Option(min=1, help="Versions to keep of a model, CURRENT being one.")] = 3,
    grace: Annotated[
        str, typer.Option(help="Spare what was published or current less long ago, as 24h.")
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the oldest versions, and what crashed writers left. Never CURRENT, nothing young, nothing in
    use.
    """
    store = _store(volume)
    grace_s = _seconds(grace)
    with _told_in_one_line():
        for name in collectable(store) if model is None else [model]:
            for verdict in collect(store, name, keep, grace_s, is_dry=dry_run):
                _tell(verdict, is_dry=dry_run, as_json=as_json)


@contextlib.contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except (ArtifactError, OSError) as error:
        fail(" ".join(str(error).split()))


def _tell(verdict: Removal, *, is_dry: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**asdict(verdict), "is_dry_run": is_dry}))
        return
    verb = ("would remove" if is_dry else "removed") if verdict.is_removed else "kept"
    typer.echo(f"{verb} {verdict.model}/{verdict.name} ({_size(verdict.size)}): {verdict.why}")


def _store(volume: Path | None) -> ArtifactStore:
    root = volume or Path(variable("WEFT_ARTIFACTS") or "")
    if root == Path():
        raise typer.BadParameter("--artifacts DIR is needed (or WEFT_ARTIFACTS)")
    if not root.is_dir():
        fail(f"{root}: no such directory")
    return ArtifactStore(root)


def _models(store: ArtifactStore, model: str | None) -> list[str]:
    if model is None:
        return store.models()
    try:
        if not store.versions(model):
            fail(f"model {model}: nothing published in {store.root}")
    except ArtifactError as error:
        fail(str(error))
    return [model]


def _row(version: Version) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": version.model,
        "version": version.version,
        "is_current": version.is_current,
        "size": version.size,
        "started": version.started,
        "digest": version.manifest.digest if version.manifest else "",
    }
    if version.problem:
        row["problem"] = version.problem
    quality = version.manifest.quality if version.manifest else None
    if quality:
        source, chosen = quality.get("source"), quality.get("chosen")
        if isinstance(source, dict) and isinstance(source.get("perplexity"), int | float):
            row["source_perplexity"] = source["perplexity"]
        for key in ("perplexity", "mean_kl"):
            if isinstance(chosen, dict) and isinstance(chosen.get(key), int | float):
                row[key] = chosen[key]
    if "source_perplexity" not in row:
        row.pop("perplexity", None)
    return row


def _size(size: int) -> str:
    number = float(size)
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no duration; write for instance 30m, 24h or 7d")
    return float(match[1]) * _UNITS[match[2] or "s"]
