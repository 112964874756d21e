"""The demo's parts: child processes, what a stream measured, what is complained of."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from pathlib import Path

import pytest

from cli.demo.processes import Service, ServiceError, Stack
from cli.demo.run import complaints
from cli.demo.streams import Fault, Load, Stream, demo_streams, percentile
from cli.demo.view import fault_rows
from weft.v1 import engine_service_pb2 as engine_pb
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as generation

SERVE = """
import json, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print("Traceback, say", flush=True)
print(json.dumps({"event": "serving", "address": "127.0.0.1:7"}), flush=True)
while not stop:
    time.sleep(0.01)
open(sys.argv[1], "a").write(sys.argv[2] + " ")
sys.exit(int(sys.argv[3]))
"""


def fake(log: Path, name: str, code: int = 0) -> list[str]:
    return [sys.executable, "-c", SERVE, str(log), name, str(code)]


def test_a_stack_stops_in_reverse_order(tmp_path: Path) -> None:
    stack, order = Stack(), tmp_path / "order"
    for name in ("engine", "gateway"):
        service = stack.start(name, fake(order, name), tmp_path / "logs")
        assert service.wait_for("serving", 10)["address"] == "127.0.0.1:7"
    assert not stack.dead
    assert stack.stop() == []
    assert order.read_text() == "gateway engine "


def test_one_that_stops_badly_does_not_keep_the_others_up(tmp_path: Path) -> None:
    stack, order = Stack(), tmp_path / "order"
    for name, code in (("engine", 0), ("gateway", 3)):
        stack.start(name, fake(order, name, code), tmp_path / "logs").wait_for("serving", 10)
    (problem,) = stack.stop()
    assert problem.startswith("gateway exited with 3")
    assert "Traceback, say" in problem, "the last log lines are shown"
    assert order.read_text() == "gateway engine "


def test_a_service_that_dies_early_shows_its_log(tmp_path: Path) -> None:
    service = Service(
        "engine", [sys.executable, "-c", "print('no such model'); raise SystemExit(4)"], tmp_path
    )
    with pytest.raises(ServiceError, match=r"engine exited with 4\n(.|\n)*no such model"):
        service.wait_for("serving", 10)


def test_a_service_that_never_serves_is_given_up(tmp_path: Path) -> None:
    stack = Stack()
    service = stack.start("engine", fake(tmp_path / "order", "engine"), tmp_path)
    service.wait_for("serving", 10)
    with pytest.raises(ServiceError, match="no 'loaded' within"):
        service.wait_for("loaded", 0.2)
    assert stack.stop() == []


def test_an_event_logged_just_before_the_end_is_seen(tmp_path: Path) -> None:
    line = json.dumps({"event": "serving", "address": "x"})
    service = Service("engine", [sys.executable, "-c", f"print({line!r})"], tmp_path)
    time.sleep(0.3)
    assert service.wait_for("serving", 10)["address"] == "x"


def test_a_stream_measures_from_submit_to_token() -> None:
    stream = Stream("t", pb.GenerateRequest(), submitted_at=10.0)
    assert stream.state == "waiting"
    stream.add(pb.Delta(text="", token_ids=[]), 10.1)
    assert stream.first_token_at is None, "text without tokens is no first token"
    stream.add(pb.Delta(text="a", token_ids=[1]), 10.5)
    stream.add(pb.Delta(text="bc", token_ids=[2, 3]), 10.7)
    assert (stream.text, stream.num_tokens, stream.first_token_at, stream.state) == (
        "abc",
        3,
        10.5,
        "running",
    )
    assert stream.gaps_s == pytest.approx([0.1, 0.1])


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([3, 1, 2], 50) == 2
    assert percentile(range(1, 101), 99) == 99
    assert percentile([5.0], 99) == 5.0
    assert math.isnan(percentile([], 50))


def test_sixteen_different_requests_with_a_common_opening() -> None:
    requests = [stream.request for stream in demo_streams()]
    assert len({request.request_id for request in requests}) == len(requests) == 16
    assert len({request.text[:200] for request in requests if request.text}) == 1
    assert all(request.sampling.HasField("seed") for request in requests)


async def test_the_fault_meets_the_busiest_engine_once_there_are_enough_tokens() -> None:
    stream, load, struck = Stream("t", pb.GenerateRequest()), Load(), []
    fault = Fault(2, struck.append)
    watch = asyncio.create_task(fault.watch([stream], load, time.monotonic()))
    stream.add(pb.Delta(token_ids=[1]), 1.0)
    load.running = [1, 3]
    await asyncio.sleep(0.1)
    assert not struck
    assert complaints([], load, fault) == ["the streams ended before an engine was killed"]
    stream.add(pb.Delta(token_ids=[2, 3]), 1.5)
    await watch
    assert struck == [1]
    assert (fault.num_tokens, stream.worst_gap_s) == (3, 0.5)
    assert complaints([], load, fault) == ["no stream was on the engine that was killed"]
    assert complaints([], load, fault, num_moved=4) == []
    rows = dict(fault_rows([stream], fault, 4))
    assert rows["moved"] == "4 streams went on at the other engine; worst gap 500 ms"


def test_an_engine_that_is_killed_is_not_the_stacks_any_more(tmp_path: Path) -> None:
    stack = Stack()
    service = stack.start("engine", fake(tmp_path / "order", "engine"), tmp_path)
    service.wait_for("serving", 10)
    stack.kill(service)
    assert service.exit_code == -9
    assert not service.is_any_left
    assert stack.stop() == []


def test_complaints_name_what_is_wrong() -> None:
    finish = pb.Finish(reason=generation.FINISH_REASON_LENGTH)
    good = Stream("good", pb.GenerateRequest(), num_tokens=1, finish=finish)
    load = Load()
    load.now = engine_pb.GetLoadResponse(requests_begun=1, requests_ended=1, cached_blocks=3)
    assert complaints([good], load) == []
    load.now = engine_pb.GetLoadResponse(requests_begun=2, requests_ended=1, active_blocks=4)
    bad = Stream("bad", pb.GenerateRequest(), error="UNAVAILABLE: gone")
    assert complaints([good, bad], load) == [
        "request 'bad' UNAVAILABLE: gone",
        "request 'bad' gave no token",
        "4 blocks are still active with nothing running",
        "2 sequences begun, 1 ended",
    ]
