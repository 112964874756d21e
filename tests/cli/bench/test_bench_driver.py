"""One process' share of a load, over a transport that only waits: who is late, who goes on, what is lost."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from cli.bench.driver import Assignment, Driver, Outcome
from cli.bench.records import INTERRUPTED, OK
from cli.bench.settings import Load, ServerSettings, Settings, WorkloadSettings
from cli.bench.summary import summarize
from cli.bench.transport import Exchange, Transport, now
from cli.bench.vocabulary import Prompt


@dataclass
class Waiting(Transport):
    """Each request takes so long."""

    takes_s: float = 0.0
    made_at_first: int | None = None
    workload: Counted | None = None

    async def run(self, exchange: Exchange) -> None:
        record = exchange.record
        record.sent = now()
        if self.made_at_first is None and self.workload is not None:
            self.made_at_first = self.workload.num_made
        try:
            await asyncio.sleep(self.takes_s)
        except asyncio.CancelledError:
            record.ended(now(), INTERRUPTED)
            raise
        record.arrived(now(), 1)
        record.completion_tokens = 1
        record.ended(now(), OK)

    async def begin_session(self, session_id: str) -> bool:
        return True

    async def end_session(self, session_id: str) -> None:
        """Nothing was kept."""


@dataclass
class Counted:
    """Conversations of so many turns; counts how many were made."""

    num_turns: int = 1
    size: int | None = None
    num_made: int = field(default=0)

    def turns(self, index: int, rng: random.Random) -> list[tuple[Prompt, int]]:
        self.num_made += 1
        return [("word", 1)] * self.num_turns

    def at_s(self, index: int) -> float | None:
        return None


def settings(load: Load, **fields: Any) -> Settings:
    workload = WorkloadSettings(kind="multi-turn", think_s=0.0)
    return Settings(ServerSettings("here"), (load,), workload, arrivals="constant", **fields)


def drive(
    load: Load, transport: Waiting, workload: Counted, *, stop_at: int | None = None, **fields: Any
) -> tuple[Outcome, Assignment]:
    """A run, and what it was to do. It is stopped when `stop_at` requests were due. `max_concurrency` is of
    the settings, other fields of the assignment.
    """
    given = settings(load, max_concurrency=fields.pop("max_concurrency", None))

    async def go() -> tuple[Outcome, Assignment]:
        assignment = Assignment(load, "p0", now() + 0.02, **fields)
        stop = asyncio.Event()
        driver = Driver(given, workload, transport, assignment)
        running = asyncio.create_task(driver.run(stop))
        while stop_at is not None and len(driver._records) < stop_at:  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.01)
        if stop_at is not None:
            stop.set()
        return await running, assignment

    return asyncio.run(go())


def test_a_schedule_that_cannot_be_kept_sends_all_the_same() -> None:
    """A million a second are always late; what is late must not wait until all of them are made."""
    workload = Counted()
    transport = Waiting(workload=workload)
    outcome, _ = drive(Load(rate=1e6), transport, workload, num_conversations=2000)
    assert len(outcome.records) == 2000
    assert transport.made_at_first is not None
    assert transport.made_at_first < 20


def test_a_later_turn_is_due_when_the_one_before_has_ended() -> None:
    """Two conversations share one place: the second turn of the first waits for the other, on the clock."""
    outcome, _ = drive(Load(rate=1000.0), Waiting(0.1), Counted(2), num_conversations=2, max_concurrency=1)
    by_place = {(record.index, record.turn): record for record in outcome.records}
    first, later = by_place[0, 0], by_place[0, 1]
    assert later.scheduled >= first.end
    assert later.sent - later.scheduled > 0.09


def test_what_waited_for_its_place_when_all_was_stopped_is_counted() -> None:
    outcome, _ = drive(
        Load(rate=1000.0),
        Waiting(600.0),
        Counted(),
        num_conversations=4,
        max_concurrency=1,
        stop_at=4,
    )
    assert [record.outcome for record in outcome.records] == [INTERRUPTED]
    assert outcome.num_unsent == 3


def test_no_conversation_goes_on_after_the_end() -> None:
    outcome, _ = drive(Load(concurrency=1), Waiting(0.05), Counted(100), duration_s=0.2)
    assert len(outcome.records) <= 6


@pytest.mark.parametrize("load", [Load(concurrency=2), Load(rate=50.0)])
def test_a_window_ends_with_what_there_was_to_send(load: Load) -> None:
    outcome, assignment = drive(load, Waiting(0.01), Counted(size=4), duration_s=300.0)
    assert outcome.is_used_up
    point = summarize(settings(load), assignment, [outcome])
    assert point["window_s"] == pytest.approx(point["wall_s"])
    assert point["throughput"]["requests_per_s"] == pytest.approx(4 / point["wall_s"])
    outcome, assignment = drive(load, Waiting(0.01), Counted(), duration_s=0.3)
    assert not outcome.is_used_up
    assert summarize(settings(load), assignment, [outcome])["window_s"] == pytest.approx(0.3)
