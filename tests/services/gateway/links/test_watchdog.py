"""Dead, hung and busy, with a clock that the test turns."""

from __future__ import annotations

from services.gateway.links.watchdog import Watchdog
from weft.v1 import engine_service_pb2 as engine_pb


def beat(elapsed_ms: int, bound_ms: int) -> engine_pb.Heartbeat:
    return engine_pb.Heartbeat(epoch=1, step=7, step_elapsed_ms=elapsed_ms, step_bound_ms=bound_ms)


def test_silence_is_death_after_its_time() -> None:
    watchdog = Watchdog(dead_s=1.0, hung_s=1.0)
    watchdog.start(100.0)
    assert watchdog.problem(100.99) is None
    assert "dead" in str(watchdog.problem(101.01))
    watchdog.hear(101.5)
    assert watchdog.problem(102.4) is None


def test_a_step_within_its_bound_is_busy_and_past_it_hung() -> None:
    watchdog = Watchdog(dead_s=1.0, hung_s=1.0)
    watchdog.start(0.0)
    watchdog.beat(beat(60_000, 60_000))
    assert watchdog.problem(0.5) is None
    watchdog.beat(beat(2100, 1200))
    assert watchdog.problem(0.5) is None
    watchdog.beat(beat(2201, 1200))
    assert "step 7" in str(watchdog.problem(0.5))
    watchdog.start(1.0)
    assert watchdog.problem(1.5) is None


def test_time_in_which_this_process_stood_still_is_nobodys_silence() -> None:
    watchdog = Watchdog(dead_s=1.0, hung_s=1.0)
    watchdog.start(0.0)
    watchdog.look(0.0, 0.0)
    watchdog.look(0.1, 0.1)
    watchdog.look(3.1, 0.1)
    assert watchdog.problem(4.0) is None, "after a long stall the count begins anew"
    assert "dead" in str(watchdog.problem(4.11))
    watchdog.start(10.0)
    watchdog.look(10.0, 0.0)
    watchdog.look(10.4, 0.1)
    assert watchdog.problem(11.2) is None, "a short one is taken off"
    assert "dead" in str(watchdog.problem(11.31))


def test_a_watch_that_is_on_time_takes_nothing_off() -> None:
    watchdog = Watchdog(dead_s=1.0, hung_s=1.0)
    watchdog.start(0.0)
    for tick in range(10):
        watchdog.look(tick / 10, 0.1)
    assert watchdog.due_s(0.9) < 0.11
    assert "dead" in str(watchdog.problem(1.0))
