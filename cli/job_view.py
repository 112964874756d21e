"""A job of the quantizer's service as a person or a program reads it, and how it is followed to its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import grpc
import typer
from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cli.connection import EXIT_FAILURE, EXIT_INTERRUPTED
from weft.v1 import quantizer_service_pb2 as pb
from weft.v1.quantizer_service_pb2_grpc import QuantizerServiceStub

ENDED = (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)
CALL_TIMEOUT_S = 10.0
# A service that restarts is back within seconds; the job does not suffer meanwhile.
_PATIENCE_S = 60.0
_RETRY_S = 1.0

Metadata = tuple[tuple[str, str], ...]


def state_name(job: pb.Job) -> str:
    """ "running" of JOB_STATE_RUNNING."""
    return pb.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()


def json_line(message: pb.Job) -> str:
    """The message as one line of JSON, fields named as on the wire."""
    return MessageToJson(message, indent=None, preserving_proto_field_name=True)


def plain(text: str) -> str:
    """On one line and without what drives a terminal: what a run wrote is for reading only."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def duration(seconds: float) -> str:
    """ "1 h 02 min", "3 min 10 s" or "8 s"."""
    whole = max(round(seconds), 0)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def summary(job: pb.Job) -> str:
    """One line on where a job stands."""
    parts = [f"{job.job_id} {state_name(job)}: {plain(job.message)}"]
    if job.blocks_total and job.state not in ENDED:
        parts.append(f"{job.blocks_done} of {job.blocks_total}")
    if job.HasField("eta_seconds"):
        parts.append(f"about {duration(job.eta_seconds)} left")
    if job.artifact_version:
        parts.append(f"{job.spec.name}/{job.artifact_version}")
    if job.cancel_requested and job.state not in ENDED:
        parts.append("being cancelled")
    return ", ".join(parts)


def follow(stub: QuantizerServiceStub, job_id: str, metadata: Metadata, *, as_json: bool) -> None:
    """Show a job until it ends; exits with 1 unless it succeeded. Ctrl-C leaves the job alone."""
    last = pb.Job()
    try:
        if as_json or not sys.stderr.isatty():
            for last in changes(stub, job_id, metadata):
                typer.echo(json_line(last) if as_json else summary(last), err=not as_json)
        else:
            last = _follow_with_bar(changes(stub, job_id, metadata))
    except KeyboardInterrupt:
        typer.echo(
            f"weft: detached, the job goes on; to watch it: weft jobs watch {job_id}; "
            f"to cancel it: weft jobs cancel {job_id}",
            err=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if not as_json and last.state == pb.JOB_STATE_SUCCEEDED:
        typer.echo(f"{last.spec.name}/{last.artifact_version}")
    if last.state != pb.JOB_STATE_SUCCEEDED:
        typer.echo(f"weft: {summary(last)}", err=True)
        raise typer.Exit(EXIT_FAILURE)


def changes(stub: QuantizerServiceStub, job_id: str, metadata: Metadata) -> Iterator[pb.Job]:
    """The job whenever it has changed, to its end; a service that goes away is waited for."""
    lost_at: float | None = None
    last: pb.Job | None = None
    while last is None or last.state not in ENDED:
        call = stub.WatchJob(pb.WatchJobRequest(job_id=job_id), metadata=metadata)
        try:
            for response in call:
                lost_at = None
                if response.job != last:
                    last = response.job
                    yield last
        except grpc.RpcError as error:
            now = time.monotonic()
            lost_at = now if lost_at is None else lost_at
            is_passing = isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAVAILABLE
            if not is_passing or last is None or now - lost_at > _PATIENCE_S:
                raise
            time.sleep(_RETRY_S)
        finally:
            call.cancel()


def _follow_with_bar(jobs: Iterator[pb.Job]) -> pb.Job:
    last = pb.Job()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("waiting", total=None, left="")
        for last in jobs:
            left = f"about {duration(last.eta_seconds)} left" if last.HasField("eta_seconds") else ""
            progress.update(
                task,
                description=f"{state_name(last)}: {plain(last.message)}",
                completed=last.blocks_done,
                total=last.blocks_total or None,
                left=left,
            )
    return last
