"""A whole run: ask the server what it is, warm up, measure each load, and put the document together."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cli.bench.crew import Alone, Crew, make_transport
from cli.bench.driver import Assignment, Outcome
from cli.bench.files import read_texts, read_trace
from cli.bench.health import settle
from cli.bench.machine import describe_machine, describe_versions
from cli.bench.processes import Processes
from cli.bench.settings import Load, Settings
from cli.bench.summary import summarize
from cli.bench.transport import BenchError, Facts, now
from cli.bench.vocabulary import Vocabulary
from cli.bench.workloads import Drawn, Texts, Trace, Workload, check_length, clip

SCHEMA = "weft-bench"
SCHEMA_VERSION = 1
# Several processes must all have their orders before the start.
LEAD_S, LEAD_OF_PROCESSES_S = 0.01, 0.3
WARM_UP_CONCURRENCY = 8
PROGRESS_S = 0.5

Progress = Callable[[str], None]


@dataclasses.dataclass
class Result:
    """The document, and whether the user stopped the run."""

    document: dict[str, Any]
    is_interrupted: bool


async def bench(settings: Settings, command: Sequence[str], progress: Progress) -> Result:
    """Run every load. Raises BenchError and SettingsError before the first point; after it, a failure ends
    the run with what there is.
    """
    began = datetime.now(UTC)
    transport = make_transport(settings)
    crew: Crew | None = None
    stop = _Stop()
    points: list[dict[str, Any]] = []
    failure: str | None = None
    with stop.on_signal():
        try:
            facts, workload, told = await stop.first(_prepare(settings, transport, progress))
            crew = Alone(settings, transport) if settings.num_processes == 1 else Processes(settings)
            await stop.first(crew.open(facts, workload))
            stop.then(crew.stop)
            names = f"bench-{uuid.uuid4().hex[:12]}"
            for number, load in enumerate(settings.loads):
                try:
                    point = await _point(settings, crew, load, f"p{number}", names, progress, stop)
                except BenchError as error:
                    if not points:
                        raise
                    failure = f"{load.label}: {error}"
                    break
                if point is None:
                    break
                points.append(point)
                if stop.is_set:
                    break
        except _Stopped:
            return Result({}, True)
        finally:
            if crew is not None:
                await crew.close()
            await transport.close()
    document = _document(settings, facts, told, points, command, began)
    document |= {"is_interrupted": stop.is_set, "failure": failure}
    return Result(document, stop.is_set)


async def _prepare(
    settings: Settings, transport: Any, progress: Progress
) -> tuple[Facts, Workload, dict[str, Any]]:
    progress("asking the server")
    source, told = read_source(settings)
    await transport.open()
    facts = await transport.facts(needs_vocabulary=settings.workload.kind != "text")
    if settings.max_model_len is not None:
        facts = dataclasses.replace(facts, max_model_len=settings.max_model_len)
    workload, more = make_workload(settings, source, facts.vocabulary, facts.max_model_len)
    return facts, workload, told | more


def read_source(settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The workload's file, if it has one, and what there is to tell of it. Raises SettingsError."""
    workload = settings.workload
    if workload.kind == "trace":
        path = Path(workload.path or "")
        rows, num_bad = read_trace(path, time_scale=workload.time_scale, limit=workload.trace_limit)
        return rows, {"rows": len(rows), "bad_lines": num_bad, "trace_s": rows[-1].at_s}
    if workload.kind == "text":
        prompts, num_bad = read_texts(Path(workload.path or ""))
        return prompts, {"prompts": len(prompts), "bad_lines": num_bad}
    return None, {}


def make_workload(
    settings: Settings, source: Any, vocabulary: Vocabulary, max_model_len: int | None
) -> tuple[Workload, dict[str, Any]]:
    """The workload for a server, and what had to be changed for it. Raises SettingsError."""
    kind = settings.workload
    check_length(kind, max_model_len)
    if kind.kind == "trace":
        rows, num_clipped = clip(source, max_model_len, is_exact=vocabulary.is_exact)
        has_times = settings.loads[0].kind == "trace"
        return Trace(rows, vocabulary, has_times), {"clipped_rows": num_clipped}
    if kind.kind == "text":
        return Texts(source, kind.output_tokens[1]), {}
    return Drawn(kind, vocabulary, settings.seed), {"has_exact_prompts": vocabulary.is_exact}


async def _point(
    settings: Settings, crew: Crew, load: Load, salt: str, names: str, progress: Progress, stop: _Stop
) -> dict[str, Any] | None:
    """Measure one load. None when the run was stopped before its clock."""
    warm_up = await _warm_up(settings, crew, load, salt, names, progress)
    if stop.is_set:
        return None
    if settings.num_processes == 1:
        settle()  # the driver does it again, in no time: else the first requests would be late by it
    assignment = Assignment(
        load=load,
        salt=salt,
        start_at=now() + (LEAD_S if settings.num_processes == 1 else LEAD_OF_PROCESSES_S),
        num_conversations=_conversations(settings, settings.num_requests),
        duration_s=settings.duration_s,
        names=names,
    )
    outcomes = await _watched(crew, assignment, load.label, progress)
    point = summarize(settings, assignment, outcomes)
    point["warmup"] = warm_up
    return point


def _conversations(settings: Settings, num_requests: int | None) -> int | None:
    """How many it takes for so many requests, or a few more."""
    if settings.workload.kind != "multi-turn" or num_requests is None:
        return num_requests
    return -(-num_requests // settings.workload.turns)


async def _warm_up(
    settings: Settings, crew: Crew, load: Load, salt: str, names: str, progress: Progress
) -> dict[str, Any]:
    """Requests before the clock starts, in a closed loop of the load's concurrency, or of 8 where it has
    none. Their prompts are their own.
    """
    if not settings.num_warmup:
        return {"requests": 0, "failed": 0}
    most = max(settings.num_processes, min(load.concurrency or WARM_UP_CONCURRENCY, settings.num_warmup))
    assignment = Assignment(
        load=Load(concurrency=most),
        salt=f"{salt}w",
        start_at=now(),
        num_conversations=_conversations(settings, settings.num_warmup),
        names=names,
    )
    outcomes = await _watched(crew, assignment, f"{load.label} warm-up", progress)
    records = [record for outcome in outcomes for record in outcome.records]
    failed = [record for record in records if record.outcome == "failed"]
    if failed and len(failed) == len(records):
        raise BenchError(f"every warm-up request failed: {failed[0].status}: {failed[0].reason}")
    return {"requests": len(records), "failed": len(failed)}


async def _watched(crew: Crew, assignment: Assignment, label: str, progress: Progress) -> list[Outcome]:
    running = asyncio.ensure_future(crew.run(assignment))
    try:
        while True:
            done, _ = await asyncio.wait([running], timeout=PROGRESS_S)
            if done:
                return running.result()
            elapsed = max(0.0, now() - assignment.start_at)
            counts = crew.progress()
            told = f": {counts[0]} done, {counts[1]} running" if counts else ""
            progress(f"{label}{told}, {elapsed:.0f} s")
    finally:
        running.cancel()
        with contextlib.suppress(BaseException):
            await running


def _document(
    settings: Settings,
    facts: Facts,
    told: dict[str, Any],
    points: list[dict[str, Any]],
    command: Sequence[str],
    began: datetime,
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "started_at": began.isoformat(timespec="seconds"),
        "duration_s": round(time.time() - began.timestamp(), 3),
        "command": list(command),
        "settings": describe_settings(settings),
        "server": {
            "transport": settings.server.transport,
            "address": settings.server.url or settings.server.target,
            "endpoint": settings.server.endpoint,
            "model": facts.model,
            "version": facts.version,
            "digest": facts.digest,
            "max_model_len": facts.max_model_len,
            **facts.more,
        },
        "workload": told,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "points": points,
    }


def describe_settings(settings: Settings) -> dict[str, Any]:
    """All of them but the key and whom they are for, as JSON holds them."""
    found = dataclasses.asdict(settings)
    server = found.pop("server")
    found["extra_body"] = server["extra_body"]
    found["num_channels"] = server["num_channels"]
    found["targets"] = [str(target) for target in settings.targets]
    found["loads"] = [dataclasses.asdict(load) | {"kind": load.kind} for load in settings.loads]
    return found


class _Stopped(Exception):
    """The user stopped the run before there was anything to report."""


class _Stop:
    """Ctrl-C, heard on the event loop. The second one is the interpreter's own again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._then: Callable[[], None] | None = None

    @property
    def is_set(self) -> bool:
        """Whether it was pressed."""
        return self._event.is_set()

    def then(self, action: Callable[[], None]) -> None:
        """What to do when it is pressed."""
        self._then = action
        if self.is_set:
            action()

    @contextlib.contextmanager
    def on_signal(self) -> Any:
        """Listen."""
        loop = asyncio.get_running_loop()

        def pressed() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            self._event.set()
            if self._then is not None:
                self._then()

        # Only the main thread may listen; elsewhere the caller cancels.
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            loop.add_signal_handler(signal.SIGINT, pressed)
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
                loop.remove_signal_handler(signal.SIGINT)

    async def first(self, work: Any) -> Any:
        """Do it, unless Ctrl-C comes first. Raises _Stopped."""
        working = asyncio.ensure_future(work)
        waiting = asyncio.create_task(self._event.wait())
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(BaseException):
                await working
            raise _Stopped
        return working.result()
