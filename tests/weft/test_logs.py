"""One line per event whatever is in it, and a caller that never waits."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Iterator

import pytest

from weft import logs

HOSTILE = 'a\r\n{"level":"error"}\x1b[31m\x00\u2028\u202e\ud800'


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger().level
    yield
    logs.stop()
    logging.getLogger().setLevel(root)
    logging.getLogger("weft").setLevel(logging.NOTSET)


def written(is_human: bool, *, level: str = "debug") -> io.StringIO:
    stream = io.StringIO()
    logs.start(level, stream=stream, is_human=is_human)
    return stream


def test_an_event_is_one_json_object():
    stream = written(False)
    token = logs.request_id.set("r-1")
    logs.get_logger("engine").info("ready", blocks=5, model="demo")
    logs.request_id.reset(token)
    logs.get_logger("engine").debug("later")
    logs.stop()
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first.pop("logger") == "engine"
    assert first == {"level": "info", "event": "ready", "request_id": "r-1", "blocks": 5, "model": "demo"}
    assert "request_id" not in second


@pytest.mark.parametrize("is_human", [False, True])
def test_text_from_outside_cannot_forge_a_line(is_human):
    stream = written(is_human)
    logs.get_logger("x").warning(HOSTILE, **{"field": HOSTILE, HOSTILE: 1})
    logging.getLogger("some.library").warning("%s", HOSTILE)
    logs.stop()
    output = stream.getvalue()
    assert len(output.splitlines()) == 2
    for forbidden in ("\r", "\x1b", "\x00", "\u2028", "\u202e", "\ud800"):
        assert forbidden not in output


def test_a_stack_is_a_field_or_indented_lines():
    for is_human in (False, True):
        stream = written(is_human)
        try:
            raise ValueError("bad\x1b[31m")
        except ValueError as error:
            logs.get_logger("x").failure("failed", error, error_id="e1")
        logs.stop()
        output = stream.getvalue()
        assert "\x1b" not in output
        assert "ValueError: bad" in output
        if is_human:
            head, *stack = output.splitlines()
            assert "error_id=e1" in head
            assert all(line.startswith("    ") for line in stack)
        else:
            assert json.loads(output)["stack"].startswith("Traceback")


def test_values_that_are_no_json_become_text():
    stream = written(False)
    logs.get_logger("x").info("event", value={1, 2}.__class__, number=float("nan"), level="mine", many=[1, 2])
    logs.stop()
    event = json.loads(stream.getvalue(), parse_constant=lambda name: pytest.fail(name))
    assert event["value"] == "<class 'set'>"
    assert event["number"] == "nan"
    assert event["level"] == "info"
    assert event["many"] == [1, 2]


def test_extra_fields_of_plain_logging_are_fields():
    stream = written(False)
    logging.getLogger("weft.engine.core").error("failed: %s", "why", extra={"key": "(1, 2)"})
    logs.stop()
    event = json.loads(stream.getvalue())
    assert (event["event"], event["key"]) == ("failed: why", "(1, 2)")


def test_long_values_are_clipped():
    stream = written(False)
    logs.get_logger("x").info("event", value="a" * 100_000)
    logs.stop()
    assert len(stream.getvalue()) < 5_000


def test_levels():
    stream = written(False, level="warning")
    log = logs.get_logger("x")
    log.info("quiet")
    log.warning("loud")
    logs.stop()
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_a_reader_that_has_stopped_costs_records_and_no_time():
    released = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            released.wait(10)
            return super().write(text)

    stream = Stuck()
    writer = logs.LogWriter(stream, is_human=False, level=logging.INFO, max_records=50)
    logging.getLogger("weft").setLevel(logging.INFO)
    writer.start()
    started = time.monotonic()
    for number in range(500):
        logs.get_logger("x").info("event", number=number)
    assert time.monotonic() - started < 1
    assert writer.num_dropped >= 440
    released.set()
    writer.stop()
    assert "records dropped" in stream.getvalue()
