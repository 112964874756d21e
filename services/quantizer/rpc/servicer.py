"""QuantizerService: messages in, jobs out. Knows neither torch nor how a job is run."""

# ruff: noqa: N802 - the methods are named as in the proto

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc

from services.quantizer.jobs.database import Database
from services.quantizer.jobs.job import Job, NewJob, QueueFull, RequestReused
from services.quantizer.jobs.spec import Rules, SpecRefused, run_options, wanted_device
from services.quantizer.jobs.store import DatabaseUnavailable, JobStore
from services.quantizer.jobs.supervisor import Supervisor
from services.quantizer.jobs.watchers import TooManyWatchers, Watchers, WatchersClosed
from services.quantizer.rpc.convert import job_message, spec_of
from weft.rpc.errors import StatusError, invalid_argument
from weft.rpc.interceptor import current_caller
from weft.rpc.unknown_fields import unknown_fields
from weft.v1 import quantizer_service_pb2 as pb
from weft.v1.quantizer_service_pb2_grpc import QuantizerServiceServicer

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["QuantizerService"].full_name
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_SPEC_BYTES = 64 << 10
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_JOB_ID = re.compile(r"[a-z0-9-]{1,64}")
_PAGE_TOKEN = re.compile(r"[0-9]{1,18}")
_RETRY_S = 2.0
_QUEUE_RETRY_S = 30.0

P = ParamSpec("P")
T = TypeVar("T")


class QuantizerServicer(QuantizerServiceServicer):
    """One coroutine per rpc."""

    def __init__(
        self,
        store: JobStore,
        supervisor: Supervisor,
        watchers: Watchers,
        rules: Rules,
        *,
        max_queued: int,
        max_kept: int,
    ) -> None:
        self._store, self._supervisor, self._watchers, self._rules = store, supervisor, watchers, rules
        self._max_queued, self._max_kept = max_queued, max_kept

    async def CreateJob(self, request: pb.CreateJobRequest, context: Any) -> pb.CreateJobResponse:
        """Queue a job, or return the one that the same request made."""
        _refuse_unknown_fields(request)
        if self._supervisor.is_stopping:
            raise _unavailable("the service is stopping", "DRAINING")
        new = await self._new_job(request)
        try:
            job, is_new = await self._run(Database.create, new, self._max_queued, self._max_kept)
        except QueueFull:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._max_queued} jobs wait already",
                retry_after_s=_QUEUE_RETRY_S,
                reason="QUEUE_FULL",
            ) from None
        except RequestReused:
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"request_id {new.request_id!r} came with another spec before",
                reason="REQUEST_REUSED",
            ) from None
        if is_new:
            self._supervisor.wake()
        return pb.CreateJobResponse(job=job_message(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        """Describe a job."""
        _refuse_unknown_fields(request)
        job = await self._get(request.job_id)
        response = pb.GetJobResponse(job=job_message(job))
        if request.include_log:
            response.log_lines.extend(await self._run(Database.log_lines, job.job_id))
        return response

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        """A page of jobs, newest first."""
        _refuse_unknown_fields(request)
        size = request.page_size or DEFAULT_PAGE_SIZE
        if size > MAX_PAGE_SIZE:
            raise invalid_argument([("page_size", f"must be at most {MAX_PAGE_SIZE}")])
        if request.page_token and not _PAGE_TOKEN.fullmatch(request.page_token):
            raise invalid_argument([("page_token", "is not from an earlier answer")])
        before = int(request.page_token) if request.page_token else None
        jobs = await self._run(Database.page, before, size + 1)
        response = pb.ListJobsResponse(jobs=[job_message(job) for job in jobs[:size]])
        if len(jobs) > size:
            response.next_page_token = str(jobs[size - 1].sequence)
        return response

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> None:
        """Send the job as it is, again whenever it has changed, until it ends."""
        _refuse_unknown_fields(request)
        try:
            with self._watchers.watch(request.job_id) as changed:
                sent: Job | None = None
                while True:
                    changed.clear()
                    self._watchers.check()
                    job = await self._get(request.job_id)
                    if job != sent:
                        sent = job
                        await context.write(pb.WatchJobResponse(job=job_message(job)))
                    if job.state.has_ended:
                        return
                    await changed.wait()
        except TooManyWatchers:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "too many watch already",
                retry_after_s=_QUEUE_RETRY_S,
                reason="TOO_MANY_WATCHERS",
            ) from None
        except WatchersClosed:
            raise _unavailable("the service is stopping; watch again when it is back", "DRAINING") from None

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        """Cancel a job that waits; have one that runs stopped."""
        _refuse_unknown_fields(request)
        job_id = _job_id(request.job_id)
        job = await self._run(Database.cancel, job_id)
        if job is None:
            raise _not_found(job_id)
        self._supervisor.cancel(job_id)
        self._watchers.notify(job_id)
        return pb.CancelJobResponse(job=job_message(job))

    async def _new_job(self, request: pb.CreateJobRequest) -> NewJob:
        violations: list[tuple[str, str]] = []
        if not _REQUEST_ID.fullmatch(request.request_id):
            violations.append(("request_id", "must be 1 to 128 of A-Z a-z 0-9 . _ -"))
        if request.spec.ByteSize() > MAX_SPEC_BYTES:
            raise invalid_argument([*violations, ("spec", f"is larger than {MAX_SPEC_BYTES} bytes")])
        spec = spec_of(request.spec)
        device = ""
        try:
            device = wanted_device(spec, self._rules)
            await asyncio.to_thread(
                run_options, spec, self._rules, self._rules.places, device or self._rules.devices[0]
            )
        except SpecRefused as refused:
            violations += [(f"spec.{field}", reason) for field, reason in refused.violations]
        if violations:
            raise invalid_argument(violations)
        body = json.dumps(spec, sort_keys=True)
        return NewJob(
            job_id=f"job-{secrets.token_hex(8)}",
            caller=current_caller.get().name or "",
            request_id=request.request_id,
            body_digest=hashlib.sha256(body.encode()).hexdigest(),
            name=request.spec.name,
            spec=body,
            device=device,
        )

    async def _get(self, job_id: str) -> Job:
        job = await self._run(Database.get, _job_id(job_id))
        if job is None:
            raise _not_found(job_id)
        return job

    async def _run(
        self, method: Callable[Concatenate[Database, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        try:
            return await self._store.run(method, *args, **kwargs)
        except DatabaseUnavailable:
            raise _unavailable("the database of jobs is busy or its disk is full", "DATABASE") from None


def _job_id(text: str) -> str:
    if not _JOB_ID.fullmatch(text):
        raise invalid_argument([("job_id", "is no id of a job")])
    return text


def _not_found(job_id: str) -> StatusError:
    return StatusError(grpc.StatusCode.NOT_FOUND, f"no job {job_id}", reason="JOB_NOT_FOUND")


def _unavailable(message: str, reason: str) -> StatusError:
    return StatusError(grpc.StatusCode.UNAVAILABLE, message, retry_after_s=_RETRY_S, reason=reason)


def _refuse_unknown_fields(request: Any) -> None:
    if found := unknown_fields(request):
        raise invalid_argument([(path, "is no field of this version") for path in found])
