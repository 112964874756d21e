"""Runs the jobs: one at a time on each device, under a lease, until the service stops. Knows neither the wire
nor how a run is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import Any

from services.quantizer.jobs.clock import Clock
from services.quantizer.jobs.database import Database
from services.quantizer.jobs.job import Job, Lease, LeaseLost
from services.quantizer.jobs.outcome import judge
from services.quantizer.jobs.ownership import Ownership
from services.quantizer.jobs.progress_log import ProgressLog
from services.quantizer.jobs.runner import Ended, Run, Runner, StartFailed, Task
from services.quantizer.jobs.spec import Places, Rules, SpecRefused, needs_network, run_options
from services.quantizer.jobs.store import DatabaseUnavailable, JobStore
from services.quantizer.jobs.watchers import Watchers
from weft import logs
from weft.artifact.history import read_fence
from weft.artifact.manifest import ArtifactError
from weft.artifact.store import ArtifactStore

LEASE_S = 20.0
BEAT_S = 4.0
LOOK_S = 1.0
RETRY_S = 1.0
_LOGGER = logs.get_logger("jobs")


@dataclass(eq=False, slots=True)
class _Active:
    """A run of this service. `is_lost`: another holds the job by now."""

    lease: Lease
    run: Run
    is_lost: bool = False
    is_cancelled: bool = False
    stops: set[asyncio.Task[None]] = field(default_factory=set)

    def stop(self) -> None:
        if not self.stops:
            self.stops.add(asyncio.ensure_future(self.run.stop()))


class Supervisor:
    """One service's share of the jobs."""

    def __init__(
        self,
        store: JobStore,
        runner: Runner,
        rules: Rules,
        watchers: Watchers,
        ownership: Ownership,
        clock: Clock,
    ) -> None:
        self._store, self._runner, self._rules = store, runner, rules
        self._watchers, self._ownership, self._clock = watchers, ownership, clock
        self._owner = ownership.owner
        self._artifacts = ArtifactStore(rules.places.artifacts)
        self._active: dict[str, _Active] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._cleaning: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._is_stopping = False

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._is_stopping

    async def start(self) -> None:
        """Take the jobs of dead services over and begin to work."""
        await self._store.run(Database.heartbeat, self._owner, LEASE_S)
        await self._take_over()
        # The heart beats from here on: ending what others have left may take longer than a lease.
        self._tasks = [asyncio.create_task(self._beat(), name="jobs-beat")]
        await self._remove_leftovers()
        self._tasks += [
            asyncio.create_task(self._work(device), name=f"jobs-{device}") for device in self._rules.devices
        ]

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Stop the job's run, if it is one of ours; the database knows already that it was cancelled."""
        active = self._active.get(job_id)
        if active is not None:
            active.is_cancelled = True
            active.stop()

    async def stop(self) -> None:
        """Stop all runs and give their jobs back to the queue; they go on when a service is back."""
        self._is_stopping = True
        self.wake()
        for active in self._active.values():
            active.stop()
        await asyncio.gather(*self._tasks[1:], return_exceptions=True)
        for beat in self._tasks[:1]:  # the lease is renewed until the last run has ended
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
        if self._cleaning is not None:
            self._cleaning.cancel()
            await asyncio.gather(self._cleaning, return_exceptions=True)
        with contextlib.suppress(DatabaseUnavailable):
            await self._store.run(Database.release, self._owner)

    # The lease.

    async def _beat(self) -> None:
        next_beat, version = 0.0, None
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self._clock.now() >= next_beat:
                    await self._store.run(Database.heartbeat, self._owner, LEASE_S)
                    if await self._take_over():
                        self._clean_up()
                    next_beat = self._clock.now() + BEAT_S
                found = await self._store.run(Database.version)
                if found != version:  # another service changed something
                    version = found
                    await self._look_after_leases()
                    self._watchers.notify_all()
            except DatabaseUnavailable as error:
                _LOGGER.warning("database unavailable", reason=str(error))
            except Exception as error:  # a bug must not let the lease run out
                _LOGGER.failure("heartbeat failed", error)

    async def _take_over(self) -> bool:
        dead = await asyncio.to_thread(self._ownership.dead, await self._store.run(Database.owners))
        taken = await self._store.run(Database.take_over, self._owner, dead)
        for job_id in taken:
            _LOGGER.warning("taken over from a service that is gone", job=job_id)
            self._watchers.notify(job_id)
        if taken:
            self.wake()
        return bool(taken)

    def _clean_up(self) -> None:
        if self._cleaning is None or self._cleaning.done():
            self._cleaning = asyncio.create_task(self._remove_leftovers(), name="jobs-leftovers")

    async def _remove_leftovers(self) -> None:
        """End the runs that no service holds. One that begins meanwhile has a larger token than `last`."""
        try:
            last = await self._store.run(Database.last_token)
            live = await self._store.run(Database.live_tokens)
        except DatabaseUnavailable as error:
            _LOGGER.warning("database unavailable", reason=str(error))
            return
        await self._runner.remove_leftovers(lambda job_id, token: token > last or live.get(job_id) == token)

    async def _look_after_leases(self) -> None:
        held = await self._store.run(Database.held, self._owner)
        for job_id, active in list(self._active.items()):
            token, is_cancelled = held.get(job_id, (None, False))
            if token != active.lease.token:
                active.is_lost = True
                active.stop()
            elif is_cancelled:
                self.cancel(job_id)

    # The work.

    async def _work(self, device: str) -> None:
        while not self._is_stopping:
            claimed = await self._claim(device)
            if claimed is None:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._wake.wait()
                continue
            job, lease = claimed
            self._watchers.notify(job.job_id)
            _LOGGER.info("job begins", job=job.job_id, name=job.name, device=device, token=lease.token)
            try:
                await self._attempt(job, lease, device)
            except LeaseLost:
                _LOGGER.warning("lease lost", job=job.job_id, token=lease.token)
            except Exception as error:  # a bug must not end the worker of a device
                _LOGGER.failure("attempt failed", error, job=job.job_id)
                try:
                    await self._settle(lease, Database.requeue, "internal error", 60.0, is_crash=True)
                except LeaseLost:
                    pass
                except Exception as again:
                    _LOGGER.failure("attempt not given back", again, job=job.job_id)
            self._watchers.notify(job.job_id)
            self.wake()

    async def _claim(self, device: str) -> tuple[Job, Lease] | None:
        try:
            return await self._store.run(Database.claim, self._owner, device, self._fence)
        except DatabaseUnavailable as error:
            _LOGGER.warning("database unavailable", reason=str(error))
        except Exception as error:  # as when another has taken this service for dead, until the next beat
            _LOGGER.failure("claim failed", error, device=device)
        return None

    def _fence(self, name: str) -> int:
        """What the volume has seen: a state directory that is new must not begin below it."""
        try:
            return read_fence(self._artifacts.model_directory(name))
        except ArtifactError:
            return 0  # the run will say what is wrong with it

    async def _attempt(self, job: Job, lease: Lease, device: str) -> None:
        spec: dict[str, Any] = json.loads(job.spec)
        try:
            options = await asyncio.to_thread(run_options, spec, self._rules, self._runner.places, device)
            task = Task(job.job_id, lease.token, device, options, needs_network(spec))
            run = await self._runner.start(task)
        except SpecRefused as error:
            await self._finish(lease, job, Ended(2, ""), ProgressLog(0.0), str(error))
            return
        except StartFailed as error:
            await self._finish(lease, job, Ended(128, ""), ProgressLog(0.0), str(error))
            return
        active = self._active[job.job_id] = _Active(lease, run)
        log = ProgressLog(self._clock.now())
        try:
            ended = await self._follow(active, log)
        finally:
            del self._active[job.job_id]
            if active.stops:
                await asyncio.gather(*active.stops, return_exceptions=True)
        if active.is_lost:
            raise LeaseLost(job.job_id)
        await self._finish(lease, job, ended, log, "", is_cancelled=active.is_cancelled)

    async def _follow(self, active: _Active, log: ProgressLog) -> Ended:
        """Pass on what the run tells until it ends; whatever goes wrong here, the run is not left alone."""
        try:
            # While the run was being started a cancel or a stop may have come, or the lease gone.
            await self._look_after_leases()
            if self._is_stopping:
                active.stop()
            async for line in active.run.lines():
                report = log.take(line, self._clock.now())
                if report is None or active.is_lost:
                    continue
                try:
                    await self._store.run(
                        Database.progress,
                        active.lease,
                        *(report.message, report.done, report.total, report.eta_s),
                        is_publishing=report.is_publishing,
                    )
                    self._watchers.notify(active.lease.job_id)
                    # With every step, so that a job that takes hours can be looked into before its end.
                    await self._store.run(Database.save_log, active.lease, list(log.tail))
                except LeaseLost:
                    active.is_lost = True
                    active.stop()
                except DatabaseUnavailable as error:
                    _LOGGER.warning("database unavailable", reason=str(error))
            return await active.run.wait()
        except BaseException:
            active.stop()
            raise

    async def _finish(
        self,
        lease: Lease,
        job: Job,
        ended: Ended,
        log: ProgressLog,
        words: str,
        *,
        is_cancelled: bool = False,
    ) -> None:
        words = _as_the_client_knows_it(words or log.last_words, self._runner.places)
        verdict = judge(
            ended,
            words,
            log.version,
            log.success,
            crashes=job.crashes,
            attempt=job.attempt,
            is_cancelled=is_cancelled,
            is_stopping=self._is_stopping,
        )
        _LOGGER.info(
            "job ends", job=job.job_id, code=ended.code, state=verdict.state, message=verdict.message
        )
        await self._settle(lease, Database.save_log, list(log.tail))
        if verdict.state is None:
            await self._settle(
                lease, Database.requeue, verdict.message, verdict.delay_s, is_crash=verdict.is_crash
            )
        else:
            await self._settle(lease, Database.end, verdict.state, verdict.message, verdict.version)

    async def _settle(self, lease: Lease, method: Any, *arguments: Any, **options: Any) -> None:
        """Until the database takes it: what a run came to must not be forgotten."""
        while True:
            try:
                await self._store.run(method, lease, *arguments, **options)
                return
            except DatabaseUnavailable as error:
                _LOGGER.warning("database unavailable", reason=str(error))
                if self._is_stopping:
                    raise LeaseLost(lease.job_id) from error  # the next service takes the job over
                await asyncio.sleep(RETRY_S)


def _as_the_client_knows_it(text: str, places: Places) -> str:
    """Paths below the roots as the client named them, the roots themselves not at all."""
    for place in (places.sources, places.artifacts, places.calibration):
        if place is not None and len(place.parts) > 1:
            text = text.replace(f"{place}/", "")
    return text
