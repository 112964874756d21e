"""`weft jobs`: what the quantizer's job service has done, does and will do."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.connection import JobServiceOptions, job_service
from cli.job_view import CALL_TIMEOUT_S, duration, follow, json_line, plain, state_name, summary
from cli.options import flattened
from weft.v1 import quantizer_service_pb2 as pb

PAGE = 100
JobId = Annotated[str, typer.Argument(help="As `weft jobs ls` shows it.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, one object per line.")]

jobs = typer.Typer(help="Jobs of the quantizer's service.", no_args_is_help=True)


@jobs.command("ls")
@flattened
def list_jobs(
    connection: JobServiceOptions,
    limit: Annotated[int, typer.Option(min=1, help="Jobs to show, newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    found: list[pb.Job] = []
    token = ""
    with job_service(connection) as stub:
        while len(found) < limit:
            request = pb.ListJobsRequest(page_size=min(limit - len(found), PAGE), page_token=token)
            response = stub.ListJobs(request, timeout=CALL_TIMEOUT_S, metadata=connection.metadata)
            found.extend(response.jobs)
            token = response.next_page_token
            if not token:
                break
    if as_json:
        for job in found:
            typer.echo(json_line(job))
        return
    table = Table()
    for heading in ("job", "name", "state", "blocks", "left", "created", "message"):
        table.add_column(heading, no_wrap=heading == "job", overflow="fold")
    for job in found:
        blocks = f"{job.blocks_done}/{job.blocks_total}" if job.blocks_total else "-"
        left = duration(job.eta_seconds) if job.HasField("eta_seconds") else ""
        created = job.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M")
        # As Text: square brackets in a message are no markup.
        cells = (job.job_id, job.spec.name, state_name(job), blocks, left, created, plain(job.message))
        table.add_row(*(Text(cell) for cell in cells))
    Console().print(table)


@jobs.command("get")
@flattened
def get_job(
    connection: JobServiceOptions,
    job_id: JobId,
    log: Annotated[bool, typer.Option("--log", help="The last lines of its log too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show one job."""
    with job_service(connection) as stub:
        request = pb.GetJobRequest(job_id=job_id, include_log=log)
        response = stub.GetJob(request, timeout=CALL_TIMEOUT_S, metadata=connection.metadata)
    if as_json:
        typer.echo(json_line(response.job))
        for line in response.log_lines:
            typer.echo(json.dumps({"log": line}))
        return
    typer.echo(summary(response.job))
    for name, value in MessageToDict(response.job.spec, preserving_proto_field_name=True).items():
        typer.echo(f"  {name}: {value}")
    for line in response.log_lines:
        typer.echo(plain(line))


@jobs.command("watch")
@flattened
def watch_job(connection: JobServiceOptions, job_id: JobId, as_json: AsJson = False) -> None:
    """Follow a job until it ends; exit status 1 unless it succeeds. Ctrl-C leaves the job alone."""
    with job_service(connection) as stub:
        follow(stub, job_id, connection.metadata, as_json=as_json)


@jobs.command("cancel")
@flattened
def cancel_job(connection: JobServiceOptions, job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job. What it has finished is kept for a while: the same job goes on from there."""
    with job_service(connection) as stub:
        request = pb.CancelJobRequest(job_id=job_id)
        job = stub.CancelJob(request, timeout=CALL_TIMEOUT_S, metadata=connection.metadata).job
    typer.echo(json_line(job) if as_json else summary(job))
