"""The command against the real gateway and the mock engine, over every protocol and with every workload."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

LIVE = "weft_gateway_requests_live"
FLAGS = {
    "grpc": "--server {grpc}",
    "multiplex": "--server {grpc} --multiplex",
    "http": "--url http://{http}",
    "chat": "--url http://{http} --endpoint chat",
}


def where(protocol: str, gateway: Any) -> str:
    return FLAGS[protocol].format(grpc=gateway.grpc, http=gateway.http)


def metric(gateway: Any, name: str) -> float:
    with urllib.request.urlopen(f"http://{gateway.http}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.rsplit(" ", 1)[0] == name)


@pytest.mark.parametrize("protocol", list(FLAGS))
def test_fixed(bench: Any, weft_gateway: Any, protocol: str) -> None:
    flags = "--requests 8 --input-tokens 60 --output-tokens 12 --goodput ttft:60000"
    ran = bench(where(protocol, weft_gateway), *flags.split())
    assert ran.result.exit_code == 0, ran.result.output
    point, server = ran.point, ran.document["server"]
    assert server["model"] == "demo"
    assert point["requests"]["ok"] == 8
    assert point["requests"]["finish_reasons"] == {"length": 8}
    assert point["throughput"]["good_share"] == 1.0
    tokens = point["tokens"]
    assert (tokens["output"]["min"], tokens["output"]["max"], tokens["shorter_than_asked"]) == (12, 12, 0)
    # Each message says how many tokens it holds, over HTTP too.
    assert tokens["itl_counts_tokens"]
    assert point["latency_ms"]["itl"]["count"] == 8 * 11
    if protocol in ("grpc", "multiplex"):
        assert tokens["input"]["min"] == tokens["input"]["max"] == 60
    else:
        assert tokens["input"]["mean"] == pytest.approx(60, rel=0.25)
    assert metric(weft_gateway, LIVE) == 0


def test_a_second_run_of_a_seed_finds_no_cache(bench: Any, weft_gateway: Any) -> None:
    """Same prompts, and yet as cold as the first time: each run has a prefix cache of its own."""
    flags = f"{where('grpc', weft_gateway)} --requests 4 --input-tokens 100 --output-tokens 2"
    for _ in range(2):
        assert bench(flags).point["tokens"]["cached_share"] == 0
    salted = f"{flags} --cache-salt mine"
    assert bench(salted).point["tokens"]["cached_share"] == 0
    again = bench(salted).point
    assert again["tokens"]["cached_share"] > 0.5
    assert any("prefix cache" in warning for warning in again["warnings"])


def test_shared_prefixes_meet_the_cache(bench: Any, weft_gateway: Any) -> None:
    flags = (
        "--workload shared-prefix --prefix-groups 2 --prefix-tokens 160 --input-tokens 16 --output-tokens 4"
    )
    point = bench(where("grpc", weft_gateway), *flags.split(), "--requests", 16, "--concurrency", 2).point
    assert point["tokens"]["input"]["max"] == 176
    assert point["tokens"]["cached_share"] > 0.5
    assert not any("prefix cache" in warning for warning in point["warnings"])


def test_sessions_are_real_and_go(bench: Any, weft_gateway: Any) -> None:
    flags = "--workload multi-turn --turns 3 --requests 6 --input-tokens 20 --output-tokens 5 --concurrency 2"
    ran = bench(where("grpc", weft_gateway), *flags.split())
    point = ran.point
    assert point["requests"]["ok"] == 6, ran.result.output
    # A turn's prompt is the whole conversation so far; of it only the new tokens were sent.
    assert point["tokens"]["input"]["max"] >= 20 * 3 + 5 * 2
    assert metric(weft_gateway, "weft_gateway_sessions") == 0


def test_a_second_run_of_conversations_is_as_cold_as_the_first(bench: Any, weft_gateway: Any) -> None:
    flags = "--workload multi-turn --turns 2 --requests 4 --input-tokens 150 --output-tokens 4 --seed 77"
    shares = [
        bench(where("grpc", weft_gateway), *flags.split()).point["tokens"]["cached_share"] for _ in "12"
    ]
    assert 0 < shares[0] == pytest.approx(shares[1], rel=0.05)


@pytest.mark.parametrize("protocol", ["http", "chat"])
def test_conversations_over_http_are_sent_again(bench: Any, weft_gateway: Any, protocol: str) -> None:
    flags = "--workload multi-turn --turns 3 --requests 6 --input-tokens 20 --output-tokens 5 --concurrency 2"
    point = bench(where(protocol, weft_gateway), *flags.split()).point
    assert point["requests"]["ok"] == 6
    assert point["tokens"]["input"]["max"] > point["tokens"]["input"]["min"] + 30


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_trace_is_replayed(bench: Any, weft_gateway: Any, tmp_path: Path, protocol: str) -> None:
    path = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:4{second}.5000000,{30 + second},{3 + second}" for second in range(6)]
    rows += ["2023-11-16 18:15:46.0,20000,5", "broken,1,1"]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    flags = f"--workload trace --file {path} --time-scale 0.1"
    ran = bench(where(protocol, weft_gateway), *flags.split(), *("--max-model-len", "2000"))
    assert ran.result.exit_code == 0, ran.result.output
    assert ran.document["workload"] == {"rows": 7, "bad_lines": 1, "trace_s": 0.55, "clipped_rows": 1}
    point = ran.point
    assert (point["load"]["kind"], point["requests"]["ok"]) == ("trace", 7)
    assert point["wall_s"] >= 0.55
    assert point["tokens"]["output"]["sum"] == sum(range(3, 9)) + 5
    if protocol == "grpc":
        assert point["tokens"]["input"]["sum"] == sum(range(30, 36)) + 1995


@pytest.mark.parametrize("protocol", ["grpc", "http", "chat"])
def test_prompts_of_a_file(bench: Any, weft_gateway: Any, tmp_path: Path, protocol: str) -> None:
    path = tmp_path / "prompts.jsonl"
    turns = [{"from": "human", "value": "Tell me of the sea."}, {"from": "gpt", "value": "No."}]
    path.write_text(
        "\n".join(map(json.dumps, [{"prompt": "Once", "max_tokens": 3}, {"conversations": turns}]))
    )
    flags = f"--workload text --file {path} --output-tokens 6 --requests 4 --ignore-eos"
    point = bench(where(protocol, weft_gateway), *flags.split()).point
    assert point["requests"]["ok"] == 4
    assert point["tokens"]["output"]["sum"] == 2 * 3 + 2 * 6


def test_cancelled_requests_leave_nothing_behind(bench: Any, weft_gateway: Any) -> None:
    for protocol in ("grpc", "multiplex", "http"):
        flags = "--requests 12 --output-tokens 40 --cancel-fraction 0.7 --concurrency 6"
        point = bench(where(protocol, weft_gateway), *flags.split()).point
        # Over HTTP a message may hold several tokens and count as one; such an answer ends before its cancel.
        assert point["requests"]["groups"]["cancelled"]["cancelled"] >= 1
        assert point["requests"]["failed"] == 0, point["errors"]
    until = time.monotonic() + 20
    while metric(weft_gateway, LIVE) and time.monotonic() < until:
        time.sleep(0.05)
    assert metric(weft_gateway, LIVE) == 0


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_wrong_model_is_one_line(bench: Any, weft_gateway: Any, protocol: str) -> None:
    ran = bench(where(protocol, weft_gateway), "--model", "nobody")
    assert ran.result.exit_code == 1
    assert len(ran.result.stderr.splitlines()) == 1
    assert "nobody" in ran.result.stderr
    assert not ran.document


def test_the_document_keeps_its_schema(bench: Any, weft_gateway: Any, root: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((root / "cli/bench/data/result.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    runs = [
        "--requests 4 --output-tokens 4 --goodput ttft:100 --goodput itl:5 --cancel-fraction 0.4",
        "--rate 20 --requests 5 --output-tokens 4 --max-concurrency 2 --slow-readers 0.3",
    ]
    for flags in runs:
        document = bench(where("grpc", weft_gateway), *flags.split()).document
        jsonschema.validate(document, schema)
        assert document["settings"]["seed"] == 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "version": 2}, schema)
    point = document["points"][0]
    del point["requests"]["failed"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)
