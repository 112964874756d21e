"""Which curves a result is drawn as. Reads documents alone; knows no picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PERCENTILES = ("p50", "p90", "p99")


@dataclass(frozen=True)
class Series:
    """Points of one curve; `rank` is its place among the percentiles, `run` among the documents. A scatter is
    not joined up.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    rank: int = 0
    run: int = 0
    is_scatter: bool = False


@dataclass(frozen=True)
class Chart:
    """One pair of axes. With `is_load_x` the loads themselves are marked, by their ratios where they are far
    apart.
    """

    title: str
    unit: str
    x_title: str
    series: tuple[Series, ...]
    is_load_x: bool = False


def charts_of(documents: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Chart]:
    """Latency and throughput against load where there are several loads; over time for a single run."""
    if len(documents) == 1 and len(documents[0]["points"]) == 1:
        return over_time(documents[0]["points"][0])
    return against_load(documents, names)


def against_load(documents: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Chart]:
    """Each load is a point of each curve."""
    kinds = {point["load"]["kind"] for document in documents for point in document["points"]}
    x_title = _axis(kinds)

    def prefix(run: int) -> str:
        return f"{names[run]} " if len(documents) > 1 else ""

    def curves(metric: str) -> tuple[Series, ...]:
        return tuple(
            Series(f"{prefix(run)}{p}", _values(document, ("latency_ms", metric, p), kinds), rank, run)
            for run, document in enumerate(documents)
            for rank, p in enumerate(PERCENTILES)
        )

    def rates(*wanted: tuple[str, str]) -> tuple[Series, ...]:
        return tuple(
            Series(f"{prefix(run)}{title}", _values(document, ("throughput", name), kinds), rank, run)
            for run, document in enumerate(documents)
            for rank, (name, title) in enumerate(wanted)
        )

    charts = [
        Chart("Time to first token", "ms", x_title, curves("ttft"), is_load_x=True),
        Chart("Gap between tokens (ITL)", "ms", x_title, curves("itl"), is_load_x=True),
        Chart("End to end", "ms", x_title, curves("e2e"), is_load_x=True),
        Chart(
            "Output tokens", "per second", x_title, rates(("output_tokens_per_s", "tokens")), is_load_x=True
        ),
        Chart(
            "Requests",
            "per second",
            x_title,
            rates(("requests_per_s", "answered"), ("goodput_requests_per_s", "good")),
            is_load_x=True,
        ),
    ]
    return _drawn([*charts, _against_throughput(documents, prefix, kinds)])


def _against_throughput(
    documents: Sequence[dict[str, Any]], prefix: Callable[[int], str], kinds: set[str]
) -> Chart:
    """What more throughput costs in latency; the points of a curve are in the order of the loads, so that it
    bends back where more load brings less.
    """
    series = []
    for run, document in enumerate(documents):
        for rank, percent in enumerate(PERCENTILES):
            pairs = (
                (point["throughput"]["output_tokens_per_s"], point["latency_ms"]["itl"][percent])
                for point in sorted(document["points"], key=lambda point: _x(point, kinds))
            )
            known = tuple((x, y) for x, y in pairs if x is not None and y is not None)
            series.append(Series(f"{prefix(run)}{percent}", known, rank, run))
    return Chart("ITL against throughput", "ms", "output tokens per second", tuple(series))


def over_time(point: dict[str, Any]) -> list[Chart]:
    """What came when, in one run."""
    timeline = [entry for entry in point["timeline"] if entry["group"] == "measured"]

    def scatter(name: str, key: str) -> Series:
        points = tuple((e["at_s"], e[key]) for e in timeline if e["outcome"] == "ok" and e[key] is not None)
        return Series(name, points, is_scatter=True)

    steps = point["steps"]
    step = steps["step_s"]

    # Of a server that counts no tokens they are not zero but unknown.
    has_tokens = point["throughput"]["output_tokens_per_s"] is not None

    def curve(name: str, key: str) -> Series:
        return Series(name, tuple((index * step, value) for index, value in enumerate(steps[key])))

    when, second = "seconds since the start, when it was due", "seconds since the start"
    charts = [
        Chart("Time to first token", "ms", when, (scatter("request", "ttft_ms"),)),
        Chart("Mean gap between tokens (TPOT)", "ms", when, (scatter("request", "tpot_ms"),)),
        Chart("End to end", "ms", when, (scatter("request", "e2e_ms"),)),
        Chart(
            "Output tokens",
            "per second",
            second,
            (curve("output tokens", "output_tokens_per_s"),) * has_tokens,
        ),
        Chart("Requests in flight", f"most in each {step:g} s", second, (curve("in flight", "in_flight"),)),
    ]
    ttfts = sorted(e["ttft_ms"] for e in timeline if e["outcome"] == "ok" and e["ttft_ms"] is not None)
    if len(ttfts) > 1:
        places = tuple((100.0 * rank / (len(ttfts) - 1), value) for rank, value in enumerate(ttfts))
        percent = "percent of requests that were as quick"
        charts.append(Chart("Time to first token", "ms", percent, (Series("request", places),)))
    return _drawn(charts)


def _drawn(charts: list[Chart]) -> list[Chart]:
    """Without what has no point."""
    found = []
    for chart in charts:
        series = tuple(one for one in chart.series if one.points)
        if series:
            found.append(Chart(chart.title, chart.unit, chart.x_title, series, chart.is_load_x))
    return found


def _axis(kinds: set[str]) -> str:
    titles = {"closed": "requests at once", "open": "requests sent per second"}
    mixed = "requests in flight, mean"
    return titles.get(next(iter(kinds)), mixed) if len(kinds) == 1 else mixed


def _x(point: dict[str, Any], kinds: set[str]) -> float:
    load = point["load"]
    if kinds == {"closed"}:
        return float(load["concurrency"])
    return float(load["rate"]) if kinds == {"open"} else float(point["concurrency"]["mean"])


def _values(
    document: dict[str, Any], path: tuple[str, ...], kinds: set[str]
) -> tuple[tuple[float, float], ...]:
    """`kinds` of all documents: on one axis a load means one thing."""
    found = []
    for point in document["points"]:
        value: Any = point
        for key in path:
            value = value[key]
        if value is not None:
            found.append((_x(point, kinds), float(value)))
    return tuple(sorted(found))
