"""The command against a server that sends tokens at known times: truth, accounting, failures, exit codes."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_server import TimedServer
from cli.bench.percentiles import percentile
from tests.cli.bench.conftest import in_thread, where

PROTOCOLS = ("grpc", "multiplex", "http", "chat")
OUTCOMES = ("ok", "failed", "cancelled", "interrupted")


def check_accounts(point: dict[str, Any]) -> None:
    requests = point["requests"]
    assert requests["sent"] == sum(requests[name] for name in OUTCOMES)
    for name in ("sent", *OUTCOMES):
        assert requests[name] == sum(group[name] for group in requests["groups"].values())
    assert requests["failed"] == sum(error["count"] for error in point["errors"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_reported_times_are_the_true_ones(bench: Any, timed: TimedServer, protocol: str) -> None:
    """Reported less true is what network and client add. A busy machine adds what it likes, now and then; a
    clock that starts late, a gap that is left out or a unit that is wrong is off every time.
    """
    timed.first_s, timed.gap_s = 0.2, 0.05
    for attempts_left in (3, 2, 1, 0):
        timed.take_truth()
        ran = bench(where(protocol, timed), "--requests", 8, "--concurrency", 8, "--output-tokens", 8)
        assert ran.result.exit_code == 0, ran.result.output
        point, found = ran.point, ran.point["latency_ms"]
        check_accounts(point)
        assert (found["ttft"]["count"], found["itl"]["count"]) == (8, 56)
        assert point["tokens"]["output"]["sum"] == 64
        assert point["throughput"]["output_tokens_per_s"] == pytest.approx(64 / point["window_s"], rel=0.01)
        off = off_ms(found, timed.take_truth()[-8:])
        assert min(off["ttft p50"], off["ttft p99"]) >= -1.0  # nothing arrives before it was sent
        if not attempts_left or max(map(abs, off.values())) < 60:
            break
    assert max(map(abs, off.values())) < 60, off
    assert abs(off["itl p50"]) < 20
    assert found["e2e"]["p50"] == pytest.approx(200 + 7 * 50, rel=0.25)
    assert found["tpot"]["p50"] == pytest.approx(50, rel=0.25)


def off_ms(found: dict[str, Any], truths: list[dict[str, Any]]) -> dict[str, float]:
    """Reported less true."""
    ttft = sorted(1e3 * (t["sent"][0] - t["received"]) for t in truths)
    gaps = sorted(1e3 * (b - a) for t in truths for a, b in itertools.pairwise(t["sent"]))
    return {
        f"{metric} p{p}": found[metric][f"p{p}"] - percentile(values, p)
        for metric, values in (("ttft", ttft), ("itl", gaps))
        for p in (50, 99)
    }


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_open_loop_counts_from_the_schedule(bench: Any, timed: TimedServer, protocol: str) -> None:
    """One at a time of 0.2 s each, ten a second: the wait grows, and all of it is latency."""
    timed.first_s, timed.gap_s = 0.2, 0.001
    flags = "--rate 10 --arrivals constant --max-concurrency 1 --requests 6 --output-tokens 2"
    point = bench(where(protocol, timed), *flags.split()).point
    assert point["concurrency"]["peak"] == 1
    assert point["latency_ms"]["ttft"]["max"] > 200 + 5 * 100 - 50
    late = point["client"]["schedule_lateness_ms"]
    assert late["count"] == 6
    # The last was due at 0.5 s and could not go before 1 s; whose fault that is, the two tell.
    assert late["max"] + point["client"]["send_wait_ms"]["max"] > 450


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_messages_of_several_tokens(bench: Any, timed: TimedServer, protocol: str) -> None:
    timed.per_message = 4
    point = bench(where(protocol, timed), "--requests", 4, "--output-tokens", 16).point
    assert point["tokens"]["per_message"] == 4
    assert (point["latency_ms"]["itl"]["count"], point["latency_ms"]["message_gap"]["count"]) == (
        4 * 15,
        4 * 3,
    )
    assert point["tokens"]["output"]["sum"] == 64


def test_a_server_without_counts_in_chunks_says_so(bench: Any, timed: TimedServer) -> None:
    timed.knows_chunk_usage, timed.per_message = False, 4
    ran = bench(where("http", timed), "--requests", 4, "--output-tokens", 16)
    assert ran.document["server"]["has_chunk_usage"] is False
    assert any("ITL is the gap between messages" in warning for warning in ran.point["warnings"])
    assert ran.point["latency_ms"]["itl"]["count"] == 4 * 3
    assert ran.point["tokens"]["output"]["sum"] == 64
    assert ran.point["throughput"]["output_tokens_per_s"] == pytest.approx(
        64 / ran.point["window_s"], rel=0.01
    )


def test_http_prompts_have_their_length_in_the_servers_tokens(bench: Any, timed: TimedServer) -> None:
    point = bench(where("http", timed), "--requests", 3, "--input-tokens", 77, "--output-tokens", 2).point
    assert point["tokens"]["input"]["min"] == point["tokens"]["input"]["max"] == 77
    body = timed.bodies[-1]
    assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (2, True, True)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_failures_are_counted_by_reason(bench: Any, timed: TimedServer, protocol: str) -> None:
    timed.fail_every = 4
    flags = "--requests 12 --output-tokens 3 --goodput ttft:60000"
    ran = bench(where(protocol, timed), *flags.split())
    assert ran.result.exit_code == 0
    point = ran.point
    check_accounts(point)
    assert (point["requests"]["failed"], point["requests"]["ok"]) == (3, 9)
    (error,) = point["errors"]
    assert error["status"] == ("HTTP 429" if protocol in ("http", "chat") else "RESOURCE_EXHAUSTED")
    assert "enough" in error["reason"]
    assert point["throughput"]["good_share"] == 0.75
    assert point["latency_ms"]["ttft"]["count"] == 9
    assert any("3 of 12 requests failed" in warning for warning in point["warnings"])
    assert error["status"] in ran.result.stdout


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_answers_that_break_off_are_failures(bench: Any, timed: TimedServer, protocol: str) -> None:
    timed.is_breaking = True
    ran = bench(where(protocol, timed), "--requests", 4, "--output-tokens", 6)
    assert ran.result.exit_code == 1
    assert ran.result.stderr.splitlines()[-1] == "weft: no request was answered"
    check_accounts(ran.point)
    status, reason = {
        "grpc": ("UNAVAILABLE", "broken"),
        "http": ("BROKEN", "the connection ended inside of an answer"),
    }[protocol]
    assert ran.point["errors"] == [{"status": status, "reason": reason, "count": 4}]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_cancels_are_sent_and_told_apart(bench: Any, timed: TimedServer, protocol: str) -> None:
    timed.gap_s = 0.01
    flags = "--requests 24 --output-tokens 20 --cancel-fraction 0.5 --concurrency 6"
    point = bench(where(protocol, timed), *flags.split()).point
    check_accounts(point)
    groups = point["requests"]["groups"]
    assert groups["cancelled"]["sent"] > 4
    assert groups["measured"]["ok"] == groups["measured"]["sent"] == point["latency_ms"]["ttft"]["count"]
    # One whose last token was on its way may have ended before the cancel.
    assert groups["cancelled"]["cancelled"] >= groups["cancelled"]["sent"] - 1
    until = time.monotonic() + 20
    while not any(truth.is_cancelled for truth in timed.truths) and time.monotonic() < until:
        time.sleep(0.02)
    assert any(truth.is_cancelled for truth in timed.truths), "the server was not told"
    received = point["others"]["cancelled"]["tokens_received"]
    assert 1 <= received["min"] <= received["max"] < 20
    assert point["others"]["cancelled"]["latency_ms"]["ttft"]["count"] == groups["cancelled"]["sent"]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_slow_readers_are_told_apart(bench: Any, timed: TimedServer, protocol: str) -> None:
    timed.gap_s = 0.002
    flags = "--requests 12 --output-tokens 60 --slow-readers 0.4 --slow-pause 0.1 --concurrency 12"
    point = bench(where(protocol, timed), *flags.split()).point
    check_accounts(point)
    slow = point["requests"]["groups"]["slow"]
    assert 1 <= slow["sent"] == slow["ok"] < 12
    assert point["others"]["slow"]["latency_ms"]["message_gap"]["max"] >= 95
    assert point["latency_ms"]["e2e"]["count"] == 12 - slow["sent"]


def test_a_duration_ends_the_sending_and_waits_for_the_rest(bench: Any, timed: TimedServer) -> None:
    flags = "--rate 40 --arrivals constant --duration 0.5 --output-tokens 200"
    point = bench(where("grpc", timed), *flags.split()).point
    assert point["requests"]["sent"] == point["requests"]["ok"] == 20
    assert point["window_s"] == 0.5
    assert point["wall_s"] > 0.5
    # Most tokens came after the window, and its rate is of those that came in it.
    assert point["throughput"]["output_tokens_per_s"] < 20 * 200 / 0.5


def test_warm_up_is_apart(bench: Any, timed: TimedServer) -> None:
    point = bench(where("http", timed), *["--requests", "5", "--warmup", "7", "--output-tokens", "4"]).point
    assert (point["requests"]["sent"], point["warmup"]) == (5, {"requests": 7, "failed": 0})
    prompts = [body["prompt"] for body in timed.bodies if body["max_tokens"] == 4]
    # What the server remembers of the warm-up must be of no use to the run.
    assert len(prompts) == len(set(prompts)) == 12


@pytest.mark.parametrize("protocol", [pytest.param("grpc", marks=pytest.mark.slow), "http"])
def test_several_processes_send_what_one_would(bench: Any, timed: TimedServer, protocol: str) -> None:
    flags = "--requests 9 --concurrency 4 --output-tokens 3 --processes 2"
    ran = bench(where(protocol, timed), *flags.split())
    assert ran.result.exit_code == 0, ran.result.output
    assert (ran.point["requests"]["ok"], ran.point["client"]["processes"]) == (9, 2)
    several = sorted(body["prompt"] for body in timed.bodies[-9:]) if protocol == "http" else []
    timed.bodies.clear()
    bench(where(protocol, timed), *flags.replace("--processes 2", "").split())
    if protocol == "http":
        assert sorted(body["prompt"] for body in timed.bodies[-9:]) == several


def test_a_sweep_has_a_point_for_each_load(bench: Any, timed: TimedServer, tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    ran = bench(
        where("grpc", timed), *f"--concurrency 1,2,4 --requests 4 --output-tokens 3 --plot {page}".split()
    )
    assert [point["load"]["concurrency"] for point in ran.document["points"]] == [1, 2, 4]
    text = page.read_text()
    assert text.count("<svg") == 6
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "prefers-color-scheme" in text
    assert max(len(line) for line in ran.result.stdout.splitlines()) <= 80


def test_a_sweep_that_fails_half_way_keeps_what_it_has(bench: Any, timed: TimedServer) -> None:
    timed.fail_after = 5
    flags = "--concurrency 1,2 --warmup 2 --requests 3 --output-tokens 2"
    ran = bench(where("grpc", timed), *flags.split())
    assert ran.result.exit_code == 1
    assert ran.point["requests"]["ok"] == 3
    assert ran.document["failure"].startswith("c=2: every warm-up request failed: RESOURCE_EXHAUSTED")
    assert ran.result.stderr.splitlines()[-1] == f"weft: {ran.document['failure']}"
    assert "end to end" in ran.result.stdout


def test_ctrl_c_reports_what_there_is(timed: TimedServer, tmp_path: Path, root: Path) -> None:
    timed.gap_s = 0.05
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "cli", "bench", *where("grpc", timed).split(), "--concurrency", "3"]
    command += ["--requests", "1000", "--output-tokens", "20", "--json", str(path)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=root, **pipes)
    try:
        while timed.num_requests < 6:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        out, error = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 130, error
    document = json.loads(path.read_text())
    (point,) = document["points"]
    check_accounts(point)
    assert document["is_interrupted"] is True
    assert point["requests"]["interrupted"] == 3
    assert 3 <= point["requests"]["ok"] < 1000
    assert "stopped early: 3 requests were running" in " ".join(out.split())
    assert "Traceback" not in error


def test_a_stream_that_the_server_ends_is_opened_again(bench: Any) -> None:
    class Ending(TimedServer):
        """Each Multiplex call has an end after one answer, as of a server that is replaced."""

        async def Multiplex(self, requests: Any, context: Any) -> Any:
            async for response in super().Multiplex(requests, context):
                yield response
                if response.HasField("end"):
                    return

    with in_thread(Ending(first_s=0.002, gap_s=0.001)) as server:
        flags = "--concurrency 1 --requests 12 --output-tokens 3"
        point = bench(where("multiplex", server), *flags.split()).point
    check_accounts(point)
    # A request that is written just when the stream ends fails; the next one finds another stream. Without
    # that, the first alone has an answer.
    assert point["requests"]["ok"] >= 4, point["errors"]
