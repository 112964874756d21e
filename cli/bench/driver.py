"""Sends requests when the load says so, and sees each through to its end. One process' share of one point.

Knows loads and conversations; does not know protocols, or what is computed from the records.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from cli.bench.arrivals import arrival_times
from cli.bench.health import Health, quiet_collector
from cli.bench.records import FAILED, SLOW, Record
from cli.bench.settings import Load, Settings
from cli.bench.transport import BenchError, Exchange, Transport, now
from cli.bench.workloads import Conversation, Turn, Workload, conversation


@dataclass(frozen=True)
class Assignment:
    """One run of one load: `share` of `num_shares` takes every conversation whose number has that rest.

    The run begins at `start_at` on the machine's clock. `salt` sets its prompts apart from other runs' of the
    same seed. `names` begins the names of its sessions.
    """

    load: Load
    salt: str
    start_at: float
    num_conversations: int | None = None
    duration_s: float | None = None
    share: int = 0
    num_shares: int = 1
    names: str = "bench"

    def part_of(self, total: int) -> int:
        """This share of a number of requests at once."""
        return total // self.num_shares + (self.share < total % self.num_shares)


@dataclass
class Outcome:
    """What one process brings back. `is_used_up`: the workload had no more before the time was over."""

    records: list[Record] = field(default_factory=list)
    num_unsent: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    lags: list[float] = field(default_factory=list)
    is_used_up: bool = False


class Driver:
    """Runs one assignment. `num_done` and `num_running` may be read meanwhile."""

    def __init__(
        self, settings: Settings, workload: Workload, transport: Transport, assignment: Assignment
    ) -> None:
        self._settings = settings
        self._workload = workload
        self._transport = transport
        self._assignment = assignment
        self._records: list[Record] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._room: asyncio.Semaphore | None = None
        self._is_used_up = False
        self.num_done = 0
        self.num_running = 0

    async def run(self, stop: asyncio.Event) -> Outcome:
        """Until all is answered, or `stop` is set: what runs then is cancelled, and told as interrupted."""
        health = Health()
        watching = asyncio.create_task(health.watch())
        load = self._closed() if self._assignment.load.kind == "closed" else self._open()
        stopping = asyncio.create_task(stop.wait())
        with quiet_collector():
            loading = asyncio.create_task(load)
            try:
                await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (loading, stopping, watching, *self._tasks):
                    task.cancel()
                results = await asyncio.gather(
                    loading, *self._tasks, watching, stopping, return_exceptions=True
                )
        for result in results:
            if isinstance(result, Exception):
                raise result
        sent = [record for record in self._records if record.sent]
        return Outcome(
            sent,
            len(self._records) - len(sent),
            health.cpu_s,
            health.wall_s,
            list(health.lags),
            self._is_used_up,
        )

    def _indices(self) -> Iterator[int]:
        limits = [n for n in (self._assignment.num_conversations, self._workload.size) if n is not None]
        numbers = itertools.count() if not limits else range(min(limits))
        yield from (n for n in numbers if n % self._assignment.num_shares == self._assignment.share)
        self._is_used_up = True

    @property
    def _end_at(self) -> float:
        duration = self._assignment.duration_s
        return float("inf") if duration is None else self._assignment.start_at + duration

    def _make(self, index: int) -> Conversation:
        return conversation(self._settings, self._workload, self._assignment.salt, index)

    async def _closed(self) -> None:
        indices = self._indices()
        await _sleep_until(self._assignment.start_at)

        async def one_after_another() -> None:
            for index in indices:
                if now() >= self._end_at:
                    return
                await self._converse(self._make(index), None)

        most = self._assignment.part_of(self._assignment.load.concurrency or 1)
        for _ in range(most):
            self._begin(one_after_another())
        await self._all_tasks()

    async def _open(self) -> None:
        settings, assignment = self._settings, self._assignment
        if settings.max_concurrency is not None:
            self._room = asyncio.Semaphore(assignment.part_of(settings.max_concurrency))
        times: Iterator[float] = itertools.repeat(0.0)
        if (rate := assignment.load.rate) is not None:
            seed = f"{settings.seed} {assignment.salt}"
            times = arrival_times(settings.arrivals, rate, settings.burstiness, seed)
        last = -1
        for index in self._indices():
            at_s = next(itertools.islice(times, index - last - 1, None))
            last = index
            # Made before it is due, so that making it makes nothing late.
            made = self._make(index)
            due = assignment.start_at + (at_s if made.at_s is None else made.at_s)
            if due >= self._end_at:
                break
            await _sleep_until(due)
            self._begin(self._converse(made, due))
        await self._all_tasks()

    def _begin(self, running: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(running)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:  # what failed is looked at in the end
            self._tasks.discard(task)

    async def _all_tasks(self) -> None:
        while self._tasks:
            done, _ = await asyncio.wait(list(self._tasks), return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()

    async def _converse(self, made: Conversation, due: float | None) -> None:
        session_id = ""
        history: list[tuple[Any, str]] = []
        is_kept = False
        if len(made.turns) > 1:
            session_id = f"{self._assignment.names}-{self._assignment.salt}-{made.index}"
        woken = now()
        try:
            for number, turn in enumerate(made.turns):
                if number:
                    await asyncio.sleep(self._settings.workload.think_s)
                    if now() >= self._end_at:
                        return
                # Whose clock runs is written down before it waits for its place: it is late, or never sent.
                record = None
                if number or due is not None:
                    record = self._record(made.index, number, turn, None if number else due)
                    if due is not None:
                        record.woken = record.scheduled if number else woken
                async with self._room or contextlib.nullcontext():
                    failure: str | bool | None = None
                    if session_id and not number:
                        failure = await self._session(session_id)
                        is_kept = failure is None
                    record = record or self._record(made.index, number, turn, None)
                    if isinstance(failure, str):
                        self._failed(record, failure)
                        return
                    await self._ask(turn, record, session_id, history)
                if record.outcome != "ok":
                    return
        finally:
            if session_id and is_kept:
                with contextlib.suppress(Exception):
                    await asyncio.shield(self._transport.end_session(session_id))

    async def _session(self, session_id: str) -> str | bool | None:
        """None: the server keeps the session; False: it has none; a text: it failed, and this is why."""
        try:
            return None if await self._transport.begin_session(session_id) else False
        except BenchError as error:
            return str(error)

    def _record(self, index: int, number: int, turn: Turn, due: float | None) -> Record:
        # In an open loop a request's clock runs from when it should have been sent, whatever kept it.
        record = Record(
            index=index,
            turn=number,
            group=turn.group,
            scheduled=now() if due is None else due,
            asked_tokens=turn.max_tokens,
            cancel_after=turn.cancel_after,
            due=due,
        )
        self._records.append(record)
        return record

    def _failed(self, record: Record, why: str) -> None:
        record.sent = now()
        record.ended(now(), FAILED, "SESSION", why)
        self.num_done += 1

    async def _ask(self, turn: Turn, record: Record, session_id: str, history: list[tuple[Any, str]]) -> None:
        seed = random.Random(f"{self._settings.seed} {record.index} {record.turn}").getrandbits(31)
        exchange = Exchange(
            prompt=turn.prompt,
            max_tokens=turn.max_tokens,
            record=record,
            seed=seed,
            history=history,
            session_id=session_id,
            pause_s=self._settings.slow_pause_s if turn.group == SLOW else 0.0,
        )
        self.num_running += 1
        try:
            await self._transport.run(exchange)
        finally:
            self.num_running -= 1
            self.num_done += 1
            if record.sent:
                record.ended(now(), FAILED, "CLIENT", "the request was left without an end")


async def _sleep_until(at: float) -> None:
    # What is late lets others run all the same, or nothing would be sent until the schedule is caught up.
    await asyncio.sleep(max(0.0, at - now()))
