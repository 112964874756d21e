"""The command against a server that sends tokens at known times: truth, accounting, failures, exit codes."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.bench_server import TimedServer
from cli.__main__ import app
from cli.bench.percentiles import percentile

FLAGS = {
    "grpc": "--server {grpc}",
    "multiplex": "--server {grpc} --multiplex",
    "http": "--url http://{http}",
    "chat": "--url http://{http}/v1 --endpoint chat",
}
OUTCOMES = ("ok", "failed", "cancelled", "interrupted")


def where(protocol: str, server: TimedServer) -> str:
    return FLAGS[protocol].format(grpc=server.grpc_address, http=server.http_address)


def check_accounts(point: dict[str, Any]) -> None:
    requests = point["requests"]
    assert requests["sent"] == sum(requests[name] for name in OUTCOMES)
    for name in ("sent", *OUTCOMES):
        assert requests[name] == sum(group[name] for group in requests["groups"].values())
    assert requests["failed"] == sum(error["count"] for error in point["errors"])


@pytest.mark.parametrize("protocol", list(FLAGS))
def test_the_reported_times_are_the_true_ones(bench: Any, timed: TimedServer, protocol: str) -> None:
    """Reported less true is what network and client add. The bounds are generous for busy machines, but a
    clock that starts late, a gap that is left out or a unit that is wrong is far outside of them.
    """
    timed.first_s, timed.gap_s = 0.2, 0.05
    ran = bench(where(protocol, timed), "--requests", 8, "--concurrency", 8, "--output-tokens", 10)
    assert ran.result.exit_code == 0, ran.result.output
    point, truths = ran.point, timed.take_truth()[-8:]
    assert point["requests"]["ok"] == 8
    true_ttft = sorted(1e3 * (t["sent"][0] - t["received"]) for t in truths)
    true_gaps = sorted(1e3 * (b - a) for t in truths for a, b in itertools.pairwise(t["sent"]))
    found = point["latency_ms"]
    assert (found["ttft"]["count"], found["itl"]["count"]) == (8, 72)
    for percent in (50, 99):
        assert -1.0 <= found["ttft"][f"p{percent}"] - percentile(true_ttft, percent) < 150
        assert abs(found["itl"][f"p{percent}"] - percentile(true_gaps, percent)) < (
            20 if percent == 50 else 150
        )
    assert found["e2e"]["p50"] == pytest.approx(200 + 9 * 50, rel=0.5)
    assert found["tpot"]["p50"] == pytest.approx(50, rel=0.5)
    assert point["tokens"]["output"]["sum"] == 80
    assert point["throughput"]["output_tokens_per_s"] == pytest.approx(80 / point["window_s"], rel=0.01)
    check_accounts(point)


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


@pytest.mark.parametrize("protocol", list(FLAGS))
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


@pytest.mark.parametrize("protocol", list(FLAGS))
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--concurrency 4 --rate 2", "not both"),
        ("--concurrency 0", "above 0"),
        ("--concurrency x", "whole numbers"),
        ("--concurrency 4,4", "twice"),
        ("--rate nan", "above 0"),
        ("--rate 1 --arrivals weibull", "--arrivals is one of"),
        ("--concurrency 1 --max-concurrency 2", "closed one"),
        ("--concurrency 1 --arrivals gamma", "--arrivals is for --rate"),
        ("--rate 1 --burstiness 2", "needs --arrivals gamma"),
        ("--requests 3 --duration 2", "not both"),
        ("--requests 0", "above 0"),
        ("--workload nothing", "--workload is one of"),
        ("--workload trace", "needs --file"),
        ("--file x", "--file is for"),
        ("--workload trace --file none.csv", "No such file"),
        ("--workload trace --file x --input-tokens 5", "the file says"),
        ("--time-scale 2", "for --workload trace"),
        ("--input-tokens 9:2", "upwards"),
        ("--goodput speed:5", "METRIC:MILLISECONDS"),
        ("--goodput ttft:5 --goodput ttft:6", "twice"),
        ("--cancel-fraction 2", "0 to 1"),
        ("--cancel-fraction 0.6 --slow-readers 0.6", "more than 1"),
        ("--slow-readers 0.1 --multiplex", "not with --multiplex"),
        ("--workload multi-turn --cancel-fraction 0.1", "not with multi-turn"),
        ("--url http://127.0.0.1:1 --multiplex", "leave out --url"),
        ("--url ftp://x", "must be as http"),
        ("--url http://127.0.0.1:x", "Port could not be cast"),
        ("--url http://127.0.0.1:1 --cache-salt x", "field of --extra-body"),
        ("--extra-body {}x --url http://127.0.0.1:1", "no JSON"),
        ("--extra-body [] --url http://127.0.0.1:1", "must be a JSON object"),
        ("--endpoint chat", "token ids are no chat"),
        ("--endpoint other", "completions or chat"),
        ("--processes 9 --concurrency 4", "more than --concurrency"),
        ("--plot x.gif", ".html or a .png"),
        ("--plot none/x.html", "no directory"),
        ("--input-tokens 99999 --output-tokens 2", "the model has 100000"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(
    bench: Any, timed: TimedServer, flags: str, message: str
) -> None:
    given = [] if "--url" in flags else where("grpc", timed).split()
    ran = bench(" ".join([*given, flags]))
    assert ran.result.exit_code == 2, ran.result.output
    told = " ".join(ran.result.stderr.replace("│", " ").split())
    assert message in told
    assert "Traceback" not in ran.result.output
    assert timed.num_requests == 0


def test_server_and_url_exclude_each_other(bench: Any) -> None:
    assert bench("--server 127.0.0.1:1 --url http://127.0.0.1:1").result.exit_code == 2


@pytest.mark.parametrize("way", ["--server", "--url"])
def test_nobody_there_is_one_line(bench: Any, way: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = bench(f"{way} {'http://' if way == '--url' else ''}{address}")
    assert ran.result.exit_code == 1
    assert len(ran.result.stderr.splitlines()) == 1
    assert ran.result.stderr.startswith(f"weft: UNAVAILABLE: nobody answers at {address}")


def test_the_key_is_in_no_result(bench: Any, timed: TimedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = f"{where('http', timed)} --requests 1 --output-tokens 2 --api-key hidden-key".split()
    monkeypatch.setattr(sys, "argv", ["weft", "bench", *flags])
    ran = bench(" ".join(flags))
    assert ran.result.exit_code == 0
    assert "hidden-key" not in json.dumps(ran.document) + ran.result.output
    assert ran.document["command"][-2:] == ["--api-key", "..."]


def test_show_plot_and_compare(bench: Any, timed: TimedServer, tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    for path, flags in ((first, ""), (second, ""), (other, "--seed 2")):
        ran = bench(f"{where('grpc', timed)} --concurrency 1,2 --requests 3 --output-tokens 3 {flags}")
        path.write_text(json.dumps(ran.document))

    def weft(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["bench", *map(str, arguments)])

    assert "end to end" in weft("show", first).stdout
    same = weft("compare", first, second)
    assert same.exit_code == 0, same.output
    assert "TTFT p99, ms" in same.stdout
    document = json.loads(second.read_text())
    document["points"][0]["latency_ms"]["ttft"]["p50"] = (
        2 * json.loads(first.read_text())["points"][0]["latency_ms"]["ttft"]["p50"]
    )
    second.write_text(json.dumps(document))
    (line,) = [x for x in weft("compare", first, second).stdout.splitlines() if "TTFT p50" in x][:1]
    assert line.split()[-1] == "2.00x"
    unlike = weft("compare", first, other)
    assert (unlike.exit_code, "seed: 1 and 2" in unlike.stderr) == (1, True)
    assert len(unlike.stderr.splitlines()) == 1
    forced = weft("compare", first, other, "--force")
    assert (forced.exit_code, "unlike: seed: 1 and 2" in forced.stdout) == (0, True)
    page = tmp_path / "both.html"
    assert weft("plot", first, second, "--out", page).exit_code == 0
    assert "a p99" in page.read_text()
    for text in ("{}", "[", '{"schema": "weft-bench", "version": 99}'):
        other.write_text(text)
        bad = weft("compare", first, other)
        assert (bad.exit_code, len(bad.stderr.splitlines())) == (1, 1)
    assert weft("show", tmp_path / "none.json").exit_code == 1
