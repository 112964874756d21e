"""One fault run: clients, faults, and what is left at the end, put together into a report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tools.chaos.checker import Expected, StreamCheck, percentile
from tools.chaos.clients import Clients, Counts
from tools.chaos.faults import Schedule
from tools.chaos.stack import Stack
from tools.chaos.workload import HTTP, Spec

# Streams that were begun get so long to end after the last fault.
END_S = 60.0
MAX_SHOWN = 20


class Requests(Protocol):
    """Where a client's requests come from."""

    def next(self) -> tuple[Spec, list[Expected]]:
        """The next request, and what it must get."""


@dataclass
class Report:
    """What a run did and found. No `problems`: nothing was lost, doubled or wrong, and all is given back."""

    seed: int
    seconds: float = 0.0
    num_streams: int = 0
    num_requests: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_lost: int = 0
    num_doubled: int = 0
    num_wrong: int = 0
    num_replays: int = 0
    num_moves: int = 0
    num_preemptions: int = 0
    began: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    worst_gap: tuple[float, float] = (0.0, 0.0)
    clients: Counts = field(default_factory=Counts)
    schedule: Schedule | None = None
    problems: list[str] = field(default_factory=list)

    def take(self, check: StreamCheck) -> None:
        """Add what one client saw."""
        self.num_requests += 1
        self.num_samples += len(check.samples)
        self.num_tokens += check.num_tokens
        self.num_lost += check.num_lost
        self.num_doubled += check.num_doubled
        self.num_wrong += check.num_wrong
        self.gaps_s += check.gaps_s
        self.worst_gap = max(self.worst_gap, check.worst_gap)
        self.problems += check.problems

    def lines(self) -> list[str]:
        """The report for people."""
        faults = self.schedule.counts if self.schedule is not None else {}
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(faults.items())) or "none"
        gaps = self.gaps_s
        p50, p99 = (1000 * percentile(gaps, p) for p in (50, 99))
        worst_s, worst_at = self.worst_gap
        clients = self.clients
        lines = [
            f"seed {self.seed}: {self.num_streams} streams at once for {self.seconds:.1f} s",
            f"faults: {told}",
            f"requests: {self.num_requests} of {self.num_samples} samples, {self.num_tokens} tokens",
            f"clients: {clients.cancelled} cancelled, {clients.slow} read slowly, "
            + f"{clients.returned} lost their connection and came back",
            f"taken up again by a resume token: {clients.resumed} requests",
            f"started again: {self.num_replays} samples; moved from engines that drained or were full: "
            + f"{self.num_moves}",
            f"preempted, on the engines that live at the end: {self.num_preemptions}",
            f"gap between tokens: p50 {p50:.0f} ms, p99 {p99:.0f} ms",
            f"worst gap: {1000 * worst_s:.0f} ms, over {worst_at - self.began:.2f} s after the start",
            f"tokens: {self.num_lost} lost, {self.num_doubled} doubled, {self.num_wrong} wrong",
        ]
        if self.problems:
            lines += [f"PROBLEM {problem}" for problem in self.problems[:MAX_SHOWN]]
            if len(self.problems) > MAX_SHOWN:
                lines.append(f"and {len(self.problems) - MAX_SHOWN} more")
            lines += ["the faults, in order:", *map(str, self.schedule.trace if self.schedule else [])]
        return lines


async def run(
    stack: Stack, schedule: Schedule, workloads: Sequence[Requests], seconds: float, *, checks_logprobs: bool
) -> Report:
    """Run clients, one for each workload, under the schedule. The stack is up before and after."""
    report = Report(schedule.seed, num_streams=len(workloads), schedule=schedule)
    report.began = began = time.monotonic()
    until = began + seconds
    checks: list[StreamCheck] = []
    async with Clients(stack.target, stack.http, checks_logprobs=checks_logprobs) as clients:
        report.clients = clients.counts

        async def work(workload: Requests) -> None:
            while time.monotonic() < until:
                spec, expected = workload.next()
                check = StreamCheck(spec.name, expected, has_tokens=spec.way != HTTP)
                checks.append(check)
                await clients.run(spec, check)

        workers = [asyncio.create_task(work(workload)) for workload in workloads]
        faults = asyncio.create_task(schedule.run(seconds))
        try:
            await faults
            _, late = await asyncio.wait(workers, timeout=END_S)
            report.problems += [f"{len(late)} streams did not end within {END_S:.0f} s"] * bool(late)
            report.problems += [
                f"a client failed: {worker.exception()!r}"
                for worker in workers
                if worker.done() and worker.exception() is not None
            ]
        finally:
            for task in (faults, *workers):
                task.cancel()
            await asyncio.gather(faults, *workers, return_exceptions=True)
    report.seconds = time.monotonic() - began
    for check in checks:
        report.take(check)
    report.problems += await stack.problems_when_idle()
    metrics = await stack.metrics()
    report.num_replays = int(metrics.get("weft_gateway_replays_total", 0))
    report.num_moves = int(metrics.get('weft_gateway_routing_events_total{event="moves"}', 0))
    loads = [await engine.load() for engine in stack.engines if engine.is_running]
    report.num_preemptions = sum(load.preemptions for load in loads)
    return report
