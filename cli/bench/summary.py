"""One point's numbers out of its processes' outcomes, and what is doubtful about them. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cli.bench import metrics
from cli.bench.driver import Assignment, Outcome
from cli.bench.percentiles import distribution, percentile
from cli.bench.records import MEASURED, OK, Record
from cli.bench.settings import Settings

MAX_TIMELINE = 1000
MAX_STEPS = 120
_STEPS_S: tuple[float, ...] = tuple(base * 10**power for power in range(-1, 8) for base in (1, 2, 5))
MAX_CPU_SHARE = 0.85
MIN_WALL_S = 0.5  # of less, a share says nothing
MAX_LATENESS_MS = 10.0
MAX_CACHED_SHARE = 0.05
_UNCACHED = ("fixed", "random", "trace", "text")


def summarize(settings: Settings, assignment: Assignment, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The point, as it stands in the JSON document."""
    records = sorted((r for o in outcomes for r in o.records), key=lambda r: (r.scheduled, r.index, r.turn))
    start = assignment.start_at
    last = max((r.end for r in records), default=start)
    end = start + assignment.duration_s if assignment.duration_s is not None else last
    # Nothing was left to send, or nothing was sent any more: the rest of the time is nobody's throughput.
    if any(r.outcome == "interrupted" for r in records) or all(o.is_used_up for o in outcomes):
        end = min(end, last)
    measured = [r for r in records if r.group == MEASURED]
    load = assignment.load
    point: dict[str, Any] = {
        "load": {"kind": load.kind, "concurrency": load.concurrency, "rate": load.rate, "label": load.label},
        "window_s": max(0.0, end - start),
        "wall_s": max(0.0, last - start),
        "requests": metrics.accounting(records, sum(o.num_unsent for o in outcomes)),
        "errors": metrics.errors(records),
        "throughput": metrics.rates(records, start, end, settings.targets),
        "latency_ms": metrics.latencies(measured),
        "tokens": metrics.token_counts(measured),
        "concurrency": metrics.concurrency(records, start, end),
        "client": client(records, outcomes),
        "others": {
            group: {
                "latency_ms": metrics.latencies(found, only_whole=False),
                "tokens_received": _received(found),
            }
            for group in ("cancelled", "slow")
            if (found := [r for r in records if r.group == group])
        },
        "timeline": timeline(records, start),
        "steps": over_time(records, start, max(end, last)),
    }
    point["warnings"] = warnings(settings, point)
    return point


def client(records: Sequence[Record], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How well the tool itself kept up. Lateness is how long after its time the scheduler came to a request
    of an open loop; the wait is how long --max-concurrency then held it back. Both are part of its latency.
    """
    late = [r.woken - r.due for r in records if r.due is not None and r.woken is not None]
    waits = [r.sent - r.woken for r in records if r.woken is not None]
    lags = sorted(lag for o in outcomes for lag in o.lags)
    return {
        "processes": len(outcomes),
        "cpu_share": max((o.cpu_s / o.wall_s for o in outcomes if o.wall_s), default=0.0),
        "cpu_s": sum(o.cpu_s for o in outcomes),
        "loop_lag_ms": {
            "p50": percentile(lags, 50) * 1e3,
            "p99": percentile(lags, 99) * 1e3,
            "max": lags[-1] * 1e3,
        }
        if lags
        else None,
        "schedule_lateness_ms": distribution(late, 1e3) if late else None,
        "send_wait_ms": distribution(waits, 1e3) if waits else None,
    }


def warnings(settings: Settings, point: dict[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    found = []
    requests, mine, tokens = point["requests"], point["client"], point["tokens"]
    failed = requests["failed"]
    if failed:
        found.append(
            f"{failed} of {requests['sent']} requests failed: latencies are of those that did not; "
            "for goodput a failure misses every target"
        )
    if requests["interrupted"]:
        waiting = f", {requests['unsent']} waited to be sent" if requests["unsent"] else ""
        found.append(f"stopped early: {requests['interrupted']} requests were running{waiting}")
    if mine["cpu_share"] > MAX_CPU_SHARE and point["wall_s"] >= MIN_WALL_S:
        found.append(
            f"the client used {mine['cpu_share']:.0%} of a core: latencies hold its own queueing; "
            "give it more --processes"
        )
    lag = mine["loop_lag_ms"]
    if lag and lag["p99"] > MAX_LATENESS_MS:
        found.append(f"the client's event loop was late: p99 {lag['p99']:.0f} ms, at most {lag['max']:.0f}")
    late = mine["schedule_lateness_ms"]
    if late and (late["p99"] or 0) > MAX_LATENESS_MS:
        found.append(f"requests were sent late: p99 {late['p99']:.0f} ms (counted in their latency)")
    cached = tokens["cached_share"]
    if settings.workload.kind in _UNCACHED and cached is not None and cached > MAX_CACHED_SHARE:
        found.append(f"{cached:.0%} of the prompt tokens came from the server's prefix cache")
    if settings.workload.is_ignoring_eos and tokens["shorter_than_asked"]:
        found.append(f"{tokens['shorter_than_asked']} answers were shorter than asked for")
    unknown = point["throughput"]["requests_without_token_count"]
    if unknown:
        found.append(f"of {unknown} requests the server did not say how many tokens they had")
    per_message = tokens["per_message"]
    if not tokens["itl_counts_tokens"] and per_message is not None and per_message > 1.1:
        found.append(
            f"a message holds {per_message:.1f} tokens on average and does not say how many: "
            "ITL is the gap between messages"
        )
    return found


def timeline(records: Sequence[Record], start: float) -> list[dict[str, Any]]:
    """Requests over time, thinned evenly to MAX_TIMELINE; times in seconds from the start."""
    step = max(1, -(-len(records) // MAX_TIMELINE))
    found = []
    for record in records[::step]:
        ttft, e2e, tpot = metrics.ttft_s(record), metrics.e2e_s(record), metrics.tpot_s(record)
        found.append(
            {
                "at_s": round(record.scheduled - start, 4),
                "group": record.group,
                "outcome": record.outcome,
                "ttft_ms": None if ttft is None else round(ttft * 1e3, 3),
                "tpot_ms": None if tpot is None else round(tpot * 1e3, 3),
                "e2e_ms": None if e2e is None else round(e2e * 1e3, 3),
                "prompt_tokens": record.prompt_tokens,
                "completion_tokens": record.num_tokens,
            }
        )
    return found


def over_time(records: Sequence[Record], start: float, end: float) -> dict[str, Any]:
    """Output tokens a second, and the most requests in flight, in at most MAX_STEPS equal steps. The last
    one is half to one and a half times as long, and its rate is of its own length: a sliver with one message
    in it would be a peak that never was.
    """
    length = max(end - start, 1e-6)
    step_s = next(step for step in _STEPS_S if length / step <= MAX_STEPS)
    count = max(1, math.floor(length / step_s + 0.5))

    def place(at: float) -> int:
        return int(min(count - 1, max(0.0, (at - start) / step_s)))

    tokens = [0.0] * count
    for record in records:
        whole = record.num_tokens
        if record.times and whole is not None:
            share = whole / len(record.times)
            weights = record.counts if record.has_counts else [share] * len(record.times)
            for at, weight in zip(record.times, weights, strict=True):
                tokens[place(at)] += weight
    widths = [step_s] * (count - 1) + [length - step_s * (count - 1)]
    return {
        "step_s": step_s,
        "output_tokens_per_s": [round(n / width, 2) for n, width in zip(tokens, widths, strict=True)],
        "in_flight": _in_flight(records, count, place),
    }


def _in_flight(records: Sequence[Record], count: int, place: Callable[[float], int]) -> list[int]:
    changes = [(r.sent, 1) for r in records] + [(r.end, -1) for r in records]
    most, running, last = [0] * count, 0, 0
    for at, change in sorted(changes):
        here = place(at)
        for index in range(last + 1, here + 1):
            most[index] = running
        running += change
        most[here] = max(most[here], running)
        last = here
    return most


def _received(records: Sequence[Record]) -> dict[str, Any]:
    return distribution([r.num_tokens for r in records if r.num_tokens is not None and r.outcome != OK]) | {
        "ok": sum(r.outcome == OK for r in records)
    }
