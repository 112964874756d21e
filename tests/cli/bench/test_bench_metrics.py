"""Numbers out of records: percentiles against numpy, latencies, goodput, accounting, windows."""

from __future__ import annotations

import random
import time
from array import array
from typing import Any

import pytest

from cli.bench import metrics
from cli.bench.driver import Assignment, Outcome
from cli.bench.percentiles import distribution, percentile
from cli.bench.records import FAILED, OK, Record
from cli.bench.settings import Load, ServerSettings, Settings, Target
from cli.bench.summary import over_time, summarize


def record(
    times: list[float],
    counts: list[int] | None = None,
    *,
    scheduled: float = 0.0,
    end: float | None = None,
    outcome: str = OK,
    **fields: Any,
) -> Record:
    counts = [1] * len(times) if counts is None else counts
    made = Record(index=0, turn=0, group="measured", scheduled=scheduled, asked_tokens=4)
    made.sent, made.times, made.counts = scheduled, array("d", times), array("L", counts)
    made.prompt_tokens, made.completion_tokens = 7, sum(counts) or None
    made.ended(times[-1] if end is None else end, outcome)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
def test_percentiles_are_numpys(count: int) -> None:
    numpy = pytest.importorskip("numpy")
    rng = random.Random(count)
    values = [rng.lognormvariate(0, 2) for _ in range(count)]
    for percent in (0, 1, 50, 90, 99, 99.9, 100):
        assert percentile(sorted(values), percent) == pytest.approx(numpy.percentile(values, percent))
    found = distribution(values, 1000.0)
    assert found["mean"] == pytest.approx(1000 * numpy.mean(values))
    assert found["p99"] == pytest.approx(1000 * numpy.percentile(values, 99))
    assert (found["min"], found["max"]) == (1000 * min(values), 1000 * max(values))


def test_of_nothing_there_is_no_percentile() -> None:
    assert distribution([]) == {
        "count": 0,
        **dict.fromkeys(("mean", "min", "p50", "p90", "p99", "max")),
    }


def test_latency_counts_from_the_scheduled_time() -> None:
    late = record([1.5, 1.75], scheduled=1.0, sent=1.4)
    assert metrics.ttft_s(late) == 0.5
    assert metrics.e2e_s(late) == 0.75


def test_a_message_of_several_tokens_is_several_gaps() -> None:
    several = record([1.0, 1.5, 2.5], [3, 1, 4])
    assert metrics.itl_s(several) == [0.0, 0.0, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert sum(metrics.itl_s(several)) == pytest.approx(1.5)
    assert metrics.message_gaps_s(several) == [0.5, 1.0]
    assert metrics.tpot_s(several) == pytest.approx(1.5 / 7)


def test_messages_without_counts_are_gaps_as_they_are() -> None:
    unknown = record([1.0, 1.5, 2.5], [0, 0, 0], completion_tokens=11)
    assert metrics.itl_s(unknown) == [0.5, 1.0]
    assert metrics.tpot_s(unknown) == pytest.approx(0.15)
    assert metrics.tokens_in_window([unknown], 0, 2.0) == (pytest.approx(22 / 3), 0)


def test_goodput_targets() -> None:
    answer = record([0.1, 0.2, 0.3, 0.9])
    for target, is_good in [
        (Target("ttft", 100.0), True),
        (Target("ttft", 99.0), False),
        (Target("tpot", 267.0), True),
        (Target("tpot", 266.0), False),
        (Target("itl", 600.0), True),
        (Target("itl", 500.0), False),
        (Target("e2e", 900.0), True),
        (Target("e2e", 899.0), False),
    ]:
        assert metrics.is_good(answer, [target]) is is_good, target
    assert not metrics.is_good(answer, [Target("ttft", 200), Target("e2e", 1)])
    assert not metrics.is_good(record([0.1], outcome=FAILED), [Target("ttft", 200)])
    assert metrics.is_good(record([0.1]), [Target("itl", 1), Target("tpot", 1)])


def test_failures_miss_goodput_and_are_counted() -> None:
    records = [record([0.1, 0.2]), record([0.1], outcome=FAILED, status="HTTP 429", reason="enough")]
    rates = metrics.rates(records, 0.0, 2.0, [Target("ttft", 500)])
    assert (rates["goodput_requests_per_s"], rates["good_share"]) == (0.5, 0.5)
    assert metrics.errors(records) == [{"status": "HTTP 429", "reason": "enough", "count": 1}]
    assert metrics.latencies(records)["ttft"]["count"] == 1
    assert metrics.latencies(records, only_whole=False)["ttft"]["count"] == 2


def test_a_server_that_never_counts_does_not_meet_every_tpot() -> None:
    unknown = record([0.1, 1.1, 2.1], [0, 0, 0], completion_tokens=None)
    assert metrics.tpot_s(unknown) is None
    assert metrics.is_good(unknown, [Target("tpot", 1000.1)])
    assert not metrics.is_good(unknown, [Target("tpot", 999.0)])


def test_only_the_window_counts_for_rates() -> None:
    records = [record([0.5, 1.5], [1, 2]), record([1.5, 2.5])]
    rates = metrics.rates(records, 0.0, 2.0, [])
    assert rates["output_tokens_per_s"] == pytest.approx(4 / 2)
    assert rates["requests_per_s"] == pytest.approx(1 / 2)
    assert rates["input_tokens_per_s"] == pytest.approx(14 / 2)


def test_peak_and_mean_concurrency() -> None:
    records = [record([1.0, 4.0]), record([3.0, 3.5], scheduled=2.0), record([5.0], scheduled=4.0)]
    found = metrics.concurrency(records, 0.0, 5.0)
    assert found == {"peak": 2, "mean": pytest.approx((4 + 1.5 + 1) / 5)}


def test_a_cancel_comes_with_its_token_and_costs_a_long_answer_nothing() -> None:
    made = record([], end=0.0)
    made.cancel_after = 6
    assert [made.arrived(1.0, tokens) for tokens in (3, 0, 1, 2)] == [False, False, False, True]
    made.cancel_after = 10**9
    began = time.process_time()
    for _ in range(20_000):  # squared, that is 10 s and more
        made.arrived(1.0, 1)
    assert time.process_time() - began < 2.0


def test_an_end_counts_once_and_the_first_holds() -> None:
    made = record([1.0], outcome=OK)
    made.ended(9.0, FAILED, "LATE")
    assert (made.outcome, made.end, made.status) == (OK, 1.0, "")


def test_steps_hold_every_token_and_the_peak() -> None:
    records = [record([0.1, 0.3, 1.1]), record([0.2, 0.25], [2, 3], scheduled=0.15)]
    found = over_time(records, 0.0, 1.15)
    step = found["step_s"]
    widths = [step] * (len(found["in_flight"]) - 1)
    widths.append(1.15 - sum(widths))
    tokens = sum(rate * width for rate, width in zip(found["output_tokens_per_s"], widths, strict=True))
    assert tokens == pytest.approx(8, abs=0.01)
    assert max(found["in_flight"]) == 2
    assert len(found["in_flight"]) <= 120


def test_the_last_step_is_no_sliver() -> None:
    """A message in the last millisecond is no thousand messages a second."""
    times = [index * 0.1 + 0.05 for index in range(120)] + [12.0005]
    found = over_time([record(times)], 0.0, 12.001)
    assert max(found["output_tokens_per_s"]) < 21


def settings(**fields: Any) -> Settings:
    return Settings(server=ServerSettings("here"), loads=(Load(concurrency=1),), **fields)


def test_every_sent_request_is_in_one_outcome_and_one_group() -> None:
    records = []
    for number, outcome in enumerate(["ok", "failed", "cancelled", "interrupted"] * 3):
        made = record([1.0], outcome=outcome)
        made.group = ("measured", "cancelled", "slow")[number % 3]
        records.append(made)
    found = metrics.accounting(records, 2)
    assert found["sent"] == 12 == sum(found[name] for name in ("ok", "failed", "cancelled", "interrupted"))
    assert sum(group["sent"] for group in found["groups"].values()) == 12
    assert found["unsent"] == 2


def test_a_busy_client_and_a_warm_cache_are_told() -> None:
    made = record([1.0, 1.1, 1.2, 1.3], cached_tokens=6)
    outcome = Outcome([made], 0, cpu_s=0.95, wall_s=1.0, lags=[0.0, 0.5])
    point = summarize(settings(), Assignment(Load(concurrency=1), "", 0.0), [outcome])
    told = "\n".join(point["warnings"])
    assert "95% of a core" in told
    assert "event loop was late" in told
    assert "prefix cache" in told
    calm = Outcome([record([1.0, 1.1, 1.2, 1.3])], 0, cpu_s=0.1, wall_s=1.0, lags=[0.0, 0.001])
    assert not summarize(settings(), Assignment(Load(concurrency=1), "", 0.0), [calm])["warnings"]


def test_a_late_schedule_is_told() -> None:
    made = record([1.5, 1.6, 1.7, 1.8], scheduled=1.0, sent=1.2, due=1.0, woken=1.1)
    point = summarize(settings(), Assignment(Load(rate=1.0), "", 0.0), [Outcome([made], 0, 0.1, 1.0, [])])
    assert point["client"]["schedule_lateness_ms"]["p99"] == pytest.approx(100)
    assert point["client"]["send_wait_ms"]["p99"] == pytest.approx(100)
    assert any("sent late" in warning for warning in point["warnings"])
    assert point["latency_ms"]["ttft"]["p50"] == pytest.approx(500)
