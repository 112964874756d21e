"""A job service in the test's own event loop, with runs that do what the test says."""

import asyncio
import json

import pytest

from services.quantizer.jobs.clock import Clock
from services.quantizer.jobs.database import Database
from services.quantizer.jobs.job import NewJob
from services.quantizer.jobs.ownership import Ownership
from services.quantizer.jobs.runner import Ended, StartFailed
from services.quantizer.jobs.spec import Places, Rules
from services.quantizer.jobs.store import JobStore
from services.quantizer.jobs.supervisor import Supervisor
from services.quantizer.jobs.watchers import Watchers


class FakeRun:
    """Says what it is told to, and ends when it is told to or stopped."""

    def __init__(self, task, obeys=True):
        self.task, self.num_stops, self.obeys = task, 0, obeys
        self._said = asyncio.Queue()
        self._ended = Ended(0, "")

    def say(self, event, **fields):
        self._said.put_nowait(json.dumps({"event": event, **fields}))

    def end(self, code, last_words="", first_line=""):
        if last_words:
            self._said.put_nowait(last_words)
        self._ended = Ended(code, first_line)
        self._said.put_nowait(None)

    async def lines(self):
        while (line := await self._said.get()) is not None:
            yield line

    async def wait(self):
        return self._ended

    async def stop(self):
        self.num_stops += 1
        if self.obeys and self.num_stops == 1:
            self.end(143, "stopped")


class FakeRunner:
    """Hands its runs to the test, in the order in which they begin."""

    def __init__(self, places):
        self.places = places
        self.begun = asyncio.Queue()
        self.runs = []
        self.fails = 0
        self.is_live = None

    async def start(self, task):
        if self.fails:
            self.fails -= 1
            raise StartFailed("no room")
        run = FakeRun(task)
        self.runs.append(run)
        self.begun.put_nowait(run)
        return run

    async def next(self):
        async with asyncio.timeout(20):
            return await self.begun.get()

    async def remove_leftovers(self, is_live):
        self.is_live = is_live

    async def close(self):
        pass


class Service:
    """One supervisor with all that it needs."""

    def __init__(self, path, state, devices, max_watchers):
        self.clock = Clock()
        self.store = JobStore(state / "jobs.sqlite", self.clock)
        self.rules = Rules(Places(path / "sources", path / "artifacts"), devices)
        self.runner = FakeRunner(self.rules.places)
        self.watchers = Watchers(max_watchers)
        self.ownership = Ownership(state)
        self.supervisor = Supervisor(
            self.store, self.runner, self.rules, self.watchers, self.ownership, self.clock
        )
        self.count = 0

    async def create(self, name="model", **spec):
        self.count += 1
        spec = {"source": "tiny", "name": name, **spec}
        key = f"{self.ownership.owner}-{self.count}"
        new = NewJob(f"job-{key}", "", key, "", name, json.dumps(spec), spec.get("device", ""))
        job, _ = await self.store.run(Database.create, new, 100, 100)
        self.supervisor.wake()
        return job.job_id

    async def get(self, job_id):
        return await self.store.run(Database.get, job_id)

    async def until(self, job_id, is_reached):
        async with asyncio.timeout(20):
            while not is_reached(job := await self.get(job_id)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return job

    async def ended(self, job_id):
        return await self.until(job_id, lambda job: job.state.has_ended)

    async def close(self):
        for run in self.runner.runs:
            run.end(143)
        if not self.supervisor.is_stopping:
            await self.supervisor.stop()
        await self.store.close()
        self.ownership.release()


@pytest.fixture
async def make_service(tmp_path):
    """await make_service(devices=...) -> a service that works; several share one state directory."""
    (tmp_path / "sources" / "tiny").mkdir(parents=True)
    (tmp_path / "artifacts").mkdir()
    made = []

    async def make(devices=("cpu",), max_watchers=100):
        service = Service(tmp_path, tmp_path / "state", devices, max_watchers)
        made.append(service)
        await service.store.open()
        await service.supervisor.start()
        return service

    yield make
    for service in made:
        await service.close()
