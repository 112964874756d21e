"""Which points a picture has, and where they stand."""

from __future__ import annotations

from typing import Any

from cli.bench.charts import charts_of


def point(kind: str, load: float, mean: float, tokens_per_s: float, itl: float) -> dict[str, Any]:
    values = {"p50": itl, "p90": itl, "p99": itl}
    return {
        "load": {
            "kind": kind,
            "concurrency": load if kind == "closed" else None,
            "rate": load if kind == "open" else None,
        },
        "concurrency": {"mean": mean},
        "throughput": {
            "output_tokens_per_s": tokens_per_s,
            "requests_per_s": 1.0,
            "goodput_requests_per_s": None,
        },
        "latency_ms": dict.fromkeys(("ttft", "itl", "e2e"), values),
    }


def test_loads_of_two_kinds_stand_on_an_axis_that_both_have() -> None:
    closed = {"points": [point("closed", 4, 3.5, 100, 1), point("closed", 8, 7.5, 150, 2)]}
    rate = {"points": [point("open", 100, 5.5, 120, 1), point("open", 200, 9.5, 130, 2)]}
    chart = charts_of([closed, rate], ["a", "b"])[0]
    assert chart.x_title == "requests in flight, mean"
    xs = {series.run: [x for x, _ in series.points] for series in chart.series}
    assert xs == {0: [3.5, 7.5], 1: [5.5, 9.5]}
    alone = charts_of([rate], ["b"])[0]
    assert (alone.x_title, [x for x, _ in alone.series[0].points]) == ("requests sent per second", [100, 200])


def test_beyond_its_best_a_curve_bends_back() -> None:
    """More load, less throughput and longer gaps: joined up by load, not by throughput."""
    document = {
        "points": [
            point("closed", 1, 1, 100, 5),
            point("closed", 64, 64, 180, 90),
            point("closed", 16, 16, 200, 20),
        ]
    }
    chart = charts_of([document], ["a"])[-1]
    assert chart.title == "ITL against throughput"
    assert chart.series[0].points == ((100, 5), (200, 20), (180, 90))


def test_tokens_that_nobody_counted_are_not_drawn_as_none() -> None:
    one = point("closed", 1, 1, 100, 5)
    one |= {"timeline": [], "steps": {"step_s": 1.0, "output_tokens_per_s": [0.0], "in_flight": [1]}}
    assert "Output tokens" in [chart.title for chart in charts_of([{"points": [one]}], ["a"])]
    one["throughput"]["output_tokens_per_s"] = None
    assert [chart.title for chart in charts_of([{"points": [one]}], ["a"])] == ["Requests in flight"]
