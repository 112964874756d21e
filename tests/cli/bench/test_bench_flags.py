"""Flags, failures before a run, and what is done with results: `show`, `plot`, `compare`."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.bench_server import TimedServer
from cli.__main__ import app
from tests.cli.bench.conftest import where


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
        ("--duration inf", "finite"),
        ("--workload multi-turn --think-time nan", "finite"),
        ("--turns 3", "--turns is for --workload multi-turn"),
        ("--think-time 1", "for --workload multi-turn"),
        ("--prefix-tokens 9", "for --workload shared-prefix"),
        ("--slow-pause 1", "--slow-readers"),
        ("--workload trace --file x --arrivals constant", "times of its own"),
        ("--url http://me:secret@127.0.0.1:1", "give a key with --api-key"),
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
    assert "secret" not in told
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
    monkeypatch.setattr(sys, "argv", ["/opt/somebody/bin/weft", "bench", *flags])
    ran = bench(" ".join(flags))
    assert ran.result.exit_code == 0
    assert "hidden-key" not in json.dumps(ran.document) + ran.result.output
    assert ran.document["command"][-2:] == ["--api-key", "..."]
    assert ran.document["command"][:2] == ["weft", "bench"]


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
