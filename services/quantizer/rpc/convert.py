"""Between the wire and the jobs: messages to specs, jobs to messages. Pure."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.json_format import ParseDict

from services.quantizer.jobs.job import Job, State
from weft.v1 import quantizer_service_pb2 as pb


def spec_of(message: pb.JobSpec) -> dict[str, Any]:
    """The fields that were set, by name; repeated ones as lists."""
    return {
        field.name: list(value) if field.is_repeated else value for field, value in message.ListFields()
    } | {
        # Set to what is nothing: that is not the same as left out.
        field.name: getattr(message, field.name)
        for field in message.DESCRIPTOR.fields
        if field.has_presence and message.HasField(field.name)
    }


def job_message(job: Job) -> pb.Job:
    """The job as a client sees it."""
    message = pb.Job(
        job_id=job.job_id,
        spec=ParseDict(json.loads(job.spec), pb.JobSpec(), ignore_unknown_fields=True),
        state=pb.JobState.Value(f"JOB_STATE_{job.state.value}"),
        progress=_progress(job),
        message=job.message,
        artifact_version=job.artifact_version,
        blocks_done=job.done,
        blocks_total=job.total,
        attempt=job.attempt,
        cancel_requested=job.is_cancelled,
        request_id=job.request_id,
        device=job.device,
    )
    message.create_time.FromMilliseconds(job.created_ms)
    if job.started_ms is not None:
        message.start_time.FromMilliseconds(job.started_ms)
    if job.ended_ms is not None:
        message.end_time.FromMilliseconds(job.ended_ms)
    if job.eta_s is not None:
        message.eta_seconds = job.eta_s
    return message


def _progress(job: Job) -> float:
    if job.state is State.SUCCEEDED:
        return 1.0
    return min(job.done / job.total, 1.0) if job.total else 0.0
