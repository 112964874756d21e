"""`weft quantize`, `import` and `export`: artifacts made or rewritten, here or by a job of the quantizer's
service.

Here means a child process: this command knows neither torch nor how weights are found.
"""

from __future__ import annotations

import subprocess
import sys
import uuid
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.connection import CONNECTION, EXIT_INTERRUPTED, JobServiceOptions, job_service, usage_errors
from cli.job_view import CALL_TIMEOUT_S, follow, json_line
from cli.options import flattened
from weft.config import flags_of, parse_float, variable
from weft.v1 import quantizer_service_pb2 as pb

RECIPE = "Recipe"
_SEPARATOR = ":"
Artifacts = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The artifact volume, without --server; else WEFT_ARTIFACTS."),
]


def _recipe(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=RECIPE)


@dataclass(frozen=True)
class RecipeOptions:
    """The fields of weft.v1.JobSpec that are not source and name; what is not given is not sent."""

    group_size: Annotated[int | None, _recipe("32, 64 or 128.")] = None
    method: Annotated[str | None, _recipe("How the values are found.")] = None
    format: Annotated[str | None, _recipe("How the artifact stores them.")] = None
    samples: Annotated[int | None, _recipe("Calibration windows.")] = None
    sequence_length: Annotated[int | None, _recipe("Tokens of a window.")] = None
    calibration: Annotated[list[str] | None, _recipe("A calibration text; repeatable.")] = None
    calibration_tokens: Annotated[int | None, _recipe("Calibration tokens, at most.")] = None
    evaluation_tokens: Annotated[int | None, _recipe("Held-out tokens; 0 skips the evaluation.")] = None
    max_perplexity_increase: Annotated[str | None, _recipe("The gate, as 1% or 0.01.")] = None
    max_kl: Annotated[float | None, _recipe("The gate in nats.")] = None
    seed: Annotated[int | None, _recipe("Chooses the calibration windows.")] = None
    propagate_error: Annotated[
        bool | None,
        typer.Option(
            "--propagate-error/--no-propagate-error",
            help="Calibrate each block on the quantized ones before it.",
            rich_help_panel=RECIPE,
        ),
    ] = None
    skip_indivisible: Annotated[
        bool | None,
        typer.Option(
            "--skip-indivisible/--no-skip-indivisible",
            help="Leave what does not divide in full precision.",
            rich_help_panel=RECIPE,
        ),
    ] = None
    revision: Annotated[str | None, _recipe("The commit of a hub repository.")] = None
    threads: Annotated[int | None, _recipe("CPU threads.")] = None
    device: Annotated[str | None, _recipe("cpu, cuda or cuda:N.")] = None

    def given(self) -> dict[str, Any]:
        """Name -> value of what was given."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def to_flags(self) -> list[str]:
        """The words for `run`."""
        texts: dict[str, str | bool] = {}
        for name, value in self.given().items():
            if isinstance(value, list):
                texts[name] = _SEPARATOR.join(value)
            else:
                texts[name] = value if isinstance(value, bool) else str(value)
        return flags_of(texts)

    def to_proto(self, source: str, name: str) -> pb.JobSpec:
        """The spec of a job. Raises ValueError on what the wire cannot hold."""
        values = self.given()
        gate = values.get("max_perplexity_increase")
        if gate is not None:
            text = gate.strip()
            is_percent = text.endswith("%")
            number = parse_float(text.removesuffix("%"))
            if not is_percent and number >= 1:
                raise ValueError(f"--max-perplexity-increase {text}: write {text}% or a fraction below 1")
            values["max_perplexity_increase"] = number / 100 if is_percent else number
        return pb.JobSpec(source=source, name=name, **values)


@dataclass(frozen=True)
class QuantizeConnection(JobServiceOptions):
    """The same, but without --server no service is asked."""

    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A job service that is to do it; without it, it is done here.",
            rich_help_panel=CONNECTION,
        ),
    ] = None


@flattened
def quantize(
    context: typer.Context,
    recipe: RecipeOptions,
    connection: QuantizeConnection,
    source: Annotated[str, typer.Argument(help="A checkpoint; with --server, below its source root.")],
    name: Annotated[str, typer.Option(help="The model name to publish under.")],
    artifacts: Artifacts = None,
    request_id: Annotated[str, typer.Option(help="Makes CreateJob repeatable; by default a new one.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and leave it to it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Quantize a checkpoint to 4 bits: here, or with --server by a job of that service.

    Further flags go to `python -m services.quantizer run`, which lists them with --help.
    """
    if connection.server is None:
        if detach or request_id or as_json or connection.api_key:
            raise typer.BadParameter(
                "--detach, --request-id, --json and --api-key are for a job: they need --server"
            )
        flags = [f"--source={source}", f"--artifacts={_volume(artifacts)}", f"--name={name}"]
        _run_child("run", [*flags, *recipe.to_flags(), *context.args])
        return
    if artifacts is not None or context.args:
        stray = "--artifacts" if artifacts is not None else context.args[0]
        raise typer.BadParameter(f"{stray} cannot go with --server")
    with usage_errors():
        request = pb.CreateJobRequest(
            request_id=request_id or uuid.uuid4().hex, spec=recipe.to_proto(source, name)
        )
    with job_service(connection) as stub:
        job = stub.CreateJob(request, timeout=CALL_TIMEOUT_S, metadata=connection.metadata).job
        if detach:
            typer.echo(json_line(job) if as_json else job.job_id)
            return
        follow(stub, job.job_id, connection.metadata, as_json=as_json)


def import_checkpoint(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A checkpoint that is quantized already.")],
    name: Annotated[str, typer.Option(help="The model name to publish under.")],
    artifacts: Artifacts = None,
) -> None:
    """Make an artifact of an AWQ, GPTQ or compressed-tensors checkpoint.

    Further flags go to `python -m services.quantizer import`.
    """
    flags = [f"--source={source}", f"--artifacts={_volume(artifacts)}", f"--name={name}"]
    _run_child("import", [*flags, *context.args])


def export_artifact(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A model of the volume.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory to make.")],
    artifacts: Artifacts = None,
) -> None:
    """Write an artifact's weights in another format, for other programs.

    Further flags (--format, --version) go to `python -m services.quantizer export`.
    """
    flags = [f"--name={name}", f"--artifacts={_volume(artifacts)}", f"--out={out}"]
    _run_child("export", [*flags, *context.args])


def _volume(artifacts: Path | None) -> str:
    found = str(artifacts or "") or variable("WEFT_ARTIFACTS")
    if not found:
        raise typer.BadParameter("--artifacts DIR is needed (or WEFT_ARTIFACTS)")
    return found


def _run_child(command: str, flags: list[str]) -> None:
    """Run the quantizer with this terminal as its own and leave with its exit status. Ctrl-C reaches it from
    the terminal; it is waited for.
    """
    child = subprocess.Popen([sys.executable, "-m", "services.quantizer", command, *flags])
    was_interrupted = False
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:
            was_interrupted = True
    if was_interrupted and code:
        raise typer.Exit(EXIT_INTERRUPTED)
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)
