"""When requests start: at once with room, in order without; what becomes of those that wait too long."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
import weakref
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from services.gateway.admission.dispatch import Dispatcher, Turn
from services.gateway.routing.places import UNBOUNDED, Places, find_places
from services.gateway.streams.live import LiveRequest
from weft.rpc.auth import ANYBODY, Caller
from weft.rpc.errors import StatusError
from weft.v1 import engine_service_pb2 as engine_pb


def info_of(model: str = "demo", digest: str = "d") -> engine_pb.GetInfoResponse:
    return engine_pb.GetInfoResponse(model_name=model, artifact_digest=digest)


class FakeSample:
    """What the dispatcher sees of a sample."""

    def __init__(self, request: FakeLive) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.end: Any = None

    def finish_without_engine(self) -> bool:
        return self.end is not None


class FakeLive:
    """What the dispatcher sees of a request."""

    def __init__(
        self,
        name: str = "",
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        prompt: int = 10,
        **how: Any,
    ) -> None:
        self.name = name
        num_samples = how.pop("num_samples", 1)
        self.resolved = SimpleNamespace(
            info=how.pop("info", info_of()),
            priority=priority,
            deadline=None if deadline_s is None else self.now() + deadline_s,
            prompt_token_ids=[0] * prompt,
        )
        self.samples = [FakeSample(self) for _ in range(num_samples)]
        self.is_closed = False
        self.failure: StatusError | None = None
        self.has_failed = asyncio.Event()
        self.on_first_token = lambda: None

    @staticmethod
    def now() -> float:
        return asyncio.get_running_loop().time()

    def fail(self, error: StatusError) -> None:
        self.failure = self.failure or error
        self.has_failed.set()


class Engines:
    """Room per model, and what was started."""

    def __init__(self, room: int = 0) -> None:
        self.room: dict[str, int | None] = {"demo": room}
        self.started: list[str] = []
        self.can_place = True
        self.has_started = asyncio.Event()
        self.prefill: dict[str, int] = {}
        self.dispatcher = Dispatcher(self.find_places, cast(Any, self.place), wait_s=0.1)

    def find_places(self, info: engine_pb.GetInfoResponse) -> Places | None:
        room = self.room.get(info.model_name)
        return None if room is None else Places(room, **self.prefill)

    def place(self, sample: Any) -> bool:
        model = sample.request.resolved.info.model_name
        self.room[model] = (self.room[model] or 0) - 1
        self.started.append(sample.request.name)
        self.has_started.set()
        return self.can_place

    def start(self, live: FakeLive, caller: Caller = ANYBODY) -> Turn:
        return self.dispatcher.start(cast(LiveRequest, live), caller)

    def free(self, model: str = "demo", number: int = 1) -> None:
        self.room[model] = (self.room[model] or 0) + number
        self.dispatcher.pump()


async def test_with_room_nothing_waits() -> None:
    engines = Engines(room=3)
    for name in "abc":
        engines.start(FakeLive(name))
    assert engines.started == ["a", "b", "c"]
    assert engines.dispatcher.num_queued_ever == 0
    assert engines.dispatcher.num_waiting == 0


async def test_without_room_the_order_is_class_then_share_then_arrival() -> None:
    engines = Engines()
    for name, key, priority in [
        ("batch", "a", 5),
        ("a1", "a", 0),
        ("a2", "a", 0),
        ("a3", "a", 0),
        ("b1", "b", 0),
        ("now", "b", -1),
    ]:
        engines.start(FakeLive(name, priority=priority), Caller(key))
    assert engines.started == []
    engines.free(number=10)
    assert engines.started == ["now", "a1", "a2", "b1", "a3", "batch"]


async def test_room_for_one_starts_one() -> None:
    engines = Engines()
    for name in "abc":
        engines.start(FakeLive(name))
    engines.free()
    assert engines.started == ["a"]
    engines.free(number=0)
    assert engines.started == ["a"]


async def test_all_samples_of_a_request_start_together() -> None:
    engines = Engines(room=1)
    engines.start(FakeLive("a", num_samples=3))
    engines.start(FakeLive("b"))
    assert engines.started == ["a"] * 3
    engines.free(number=3)
    assert engines.started == ["a"] * 3 + ["b"]


async def test_who_waits_for_one_model_holds_up_nobody_elses() -> None:
    engines = Engines()
    engines.room["other"] = 1
    engines.start(FakeLive("a"))
    engines.start(FakeLive("b", info=info_of("other")))
    assert engines.started == ["b"]
    assert {w.model: w.num_requests for w in engines.dispatcher.waiting() if w.priority == "normal"} == {
        "demo": 1,
        "other": 0,
    }


async def test_output_counts_while_it_comes() -> None:
    engines = Engines(room=1)
    running = FakeLive("a0", prompt=1)
    engines.start(running, Caller("a"))
    engines.start(FakeLive("a1"), Caller("a"))
    engines.start(FakeLive("b1"), Caller("b"))
    engines.start(FakeLive("b2"), Caller("b"))
    running.samples[0].token_ids += [1] * 100
    await asyncio.sleep(0.03)
    engines.free()
    engines.free()
    assert engines.started == ["a0", "b1", "b2"]


async def test_what_is_left_when_a_request_ends_is_charged_then() -> None:
    engines = Engines(room=1)
    running = FakeLive("a0", prompt=1)
    turn = engines.start(running, Caller("a"))
    turn.pool.settled_at = FakeLive.now() + 1000  # nobody looks in between
    engines.start(FakeLive("a1"), Caller("a"))
    engines.start(FakeLive("b1"), Caller("b"))
    running.samples[0].token_ids += [1] * 100
    turn.leave()
    turn.leave()
    assert turn.key.counter == 201
    engines.free()
    assert engines.started == ["a0", "b1"]


async def test_weights_are_shares() -> None:
    engines = Engines()
    for number in range(12):
        engines.start(FakeLive(f"a{number}"), Caller("a", weight=3.0))
        engines.start(FakeLive(f"b{number}"), Caller("b"))
    engines.free(number=12)
    assert sum(name.startswith("a") for name in engines.started) == 9


async def test_a_cancelled_request_leaves_at_once_and_costs_nothing() -> None:
    engines = Engines()
    turns = [engines.start(FakeLive(name)) for name in "abc"]
    turns[0].leave()
    assert engines.dispatcher.num_waiting == 2
    engines.free()
    assert engines.started == ["b"]
    assert turns[0].key.counter == 10


@pytest.mark.parametrize("how", ["closed", "failed", "ended"])
async def test_who_is_over_before_its_turn_is_not_started(how: str) -> None:
    engines = Engines()
    live = FakeLive("a")
    engines.start(live)
    engines.start(FakeLive("b"))
    if how == "closed":
        live.is_closed = True
    elif how == "failed":
        live.failure = StatusError(grpc.StatusCode.INTERNAL, "x")
    else:
        live.samples[0].end = object()
    engines.free()
    assert engines.started == ["b"]


async def test_a_deadline_in_the_queue_ends_it_and_costs_no_forward() -> None:
    engines = Engines()
    live = FakeLive("a", deadline_s=0.05)
    engines.start(live)
    async with asyncio.timeout(5):
        await live.has_failed.wait()
    assert live.failure is not None
    assert live.failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert engines.dispatcher.num_waiting == 0
    engines.free()
    assert engines.started == []
    assert engines.dispatcher.num_expired == 1


async def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_the_door() -> None:
    engines = Engines()
    first = engines.start(FakeLive("first"))
    engines.start(FakeLive("never", deadline_s=0.001))  # nothing is known of the pace yet
    for number in range(20):
        engines.start(FakeLive(f"{number}"))
    engines.free()
    pool = first.pool
    for _ in range(3):
        assert pool._started_at is not None
        pool._started_at -= 1.0
        engines.free()
    with pytest.raises(StatusError) as caught:
        engines.start(FakeLive("late", deadline_s=5.0))
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.reason == "QUEUE_TOO_LONG"
    engines.start(FakeLive("patient", deadline_s=100.0))
    engines.start(FakeLive("urgent", deadline_s=5.0, priority=-1))
    engines.start(FakeLive("other key", deadline_s=5.0), Caller("b"))


async def test_no_engine_for_long_fails_who_waits() -> None:
    engines = Engines()
    engines.room["demo"] = None
    live = FakeLive("a")
    engines.start(live)
    async with asyncio.timeout(5):
        await live.has_failed.wait()
    assert live.failure is not None
    assert live.failure.code is grpc.StatusCode.UNAVAILABLE
    assert live.failure.retry_after_s
    assert engines.dispatcher.num_waiting == 0


async def test_who_missed_an_engine_before_shortens_nobodys_wait() -> None:
    engines = Engines()
    engines.room["demo"] = None
    engines.start(FakeLive("a")).leave()
    await asyncio.sleep(0.2)  # longer than the wait
    live = FakeLive("b")
    engines.start(live)
    assert live.failure is None


async def test_an_engine_that_comes_back_in_time_takes_who_waits() -> None:
    engines = Engines()
    engines.room["demo"] = None
    engines.start(FakeLive("a"))
    engines.room["demo"] = 1
    engines.dispatcher.pump()
    assert engines.started == ["a"]


async def test_room_that_nobody_tells_of_is_found() -> None:
    engines = Engines()
    engines.start(FakeLive("a"))
    engines.room["demo"] = 1
    async with asyncio.timeout(5):
        await engines.has_started.wait()


async def test_a_request_that_nobody_takes_fails() -> None:
    engines = Engines(room=1)
    engines.can_place = False
    live = FakeLive("a")
    engines.start(live)
    assert live.failure is not None
    assert live.failure.code is grpc.StatusCode.UNAVAILABLE


async def test_pools_of_artifacts_that_are_gone_go() -> None:
    engines = Engines()
    kept = engines.start(FakeLive("a"))
    for number in range(100):
        model = f"m{number}"
        engines.room[model] = 1
        engines.start(FakeLive(model, info=info_of(model))).leave()
    assert len(engines.dispatcher._pools) <= 3
    assert kept.pool in engines.dispatcher._pools.values()


def engine(
    digest: str,
    size: int,
    num_there: int,
    model: str = "demo",
    num_paused: int = 0,
    num_others: int = 0,
    num_waiting: int = 0,
    is_full: bool = False,
) -> Any:
    load = SimpleNamespace(
        max_batch_size=size,
        num_waiting=num_waiting,
        num_sequences=lambda num_live: num_live + num_others,
        is_full=lambda _: is_full,
    )
    return SimpleNamespace(info=info_of(model, digest), load=load, num_live=num_there, num_paused=num_paused)


def number(engines: list[Any]) -> int | None:
    places = find_places(engines, info_of())
    return None if places is None else places.num_sequences


def test_places_are_those_of_one_artifact_and_a_few_ahead() -> None:
    assert number([]) is None
    assert number([engine("other", 8, 0), engine("d", 8, 0, "x")]) is None
    assert number([engine("d", 8, 8)]) == 2
    assert number([engine("d", 8, 10)]) == 0
    assert number([engine("d", 8, 10, num_paused=4)]) == 4
    assert number([engine("d", 8, 2, num_others=4)]) == 4
    assert number([engine("d", 8, 1, num_others=40)]) == 1, "another gateway's crowd"
    assert number([engine("d", 8, 2, num_others=40)]) == 0
    assert number([engine("d", 64, 60), engine("d", 8, 20)]) == 12
    assert number([engine("d", 64, 20, num_waiting=7)]) == 52
    assert number([engine("d", 64, 20, num_waiting=9)]) == 0, "it is short of blocks"
    assert number([engine("d", 64, 20, num_waiting=9, num_paused=9)]) == 61, (
        "who is paused waits for its client"
    )
    assert number([engine("d", 8, 4, is_full=True)]) == 0, "its queue holds no more"
    other_version = engine("d", 8, 0)
    other_version.info.artifact_version = "v2"
    assert number([other_version]) is None


def test_prompts_for_two_steps_are_enough() -> None:
    small, large = engine("d", 8, 0), engine("d", 64, 0)
    assert find_places([small, large], info_of()) == Places(82, 10, 2 * UNBOUNDED)
    small.info.max_batched_tokens, large.info.max_batched_tokens = 512, 2048
    assert find_places([small, large], info_of()) == Places(82, 10, 5120)


async def test_an_engine_busy_with_prompts_is_sent_no_more() -> None:
    engines = Engines(room=100)
    engines.prefill = {"num_ahead": 2, "num_prompt_tokens": 50}
    lives = [FakeLive(str(number), prompt=20) for number in range(8)]
    turns = [engines.start(live) for live in lives]
    assert engines.started == ["0", "1", "2"]
    lives[1].on_first_token()
    await asyncio.sleep(0)
    assert engines.started == ["0", "1", "2", "3"]
    turns[0].leave()
    turns[0].leave()
    engines.dispatcher.pump()
    assert engines.started == ["0", "1", "2", "3", "4"]
    assert (turns[0].pool.num_in_prefill, turns[0].pool.prefill_tokens) == (3, 60)
    for turn in turns:
        turn.leave()
    assert (turns[0].pool.num_in_prefill, turns[0].pool.prefill_tokens) == (0, 0)


async def test_nothing_keeps_a_request_alive_that_was_cancelled_before_its_first_token() -> None:
    engines = Engines(room=1)
    live = FakeLive("a")
    live.samples[0].request = cast(Any, None)
    engines.place = cast(Any, lambda sample: True)  # type: ignore[method-assign]
    engines.dispatcher._place = engines.place
    seen = weakref.ref(live)
    gc.collect()
    gc.disable()
    try:
        engines.start(live).leave()
        del live
        assert seen() is None
    finally:
        gc.enable()


async def test_what_is_cancelled_in_the_middle_of_the_queue_is_let_go() -> None:
    engines = Engines()
    lives = [FakeLive(str(number)) for number in range(3)]
    turns = [engines.start(live) for live in lives]
    seen = weakref.ref(lives[1])
    turns[1].leave()
    del lives[1], turns[1]
    gc.collect()
    assert seen() is None
    engines.free(number=2)
    assert engines.started == ["0", "2"]


async def test_short_prompts_are_not_held_back_by_their_number() -> None:
    engines = Engines(room=100)
    engines.prefill = {"num_ahead": 2, "num_prompt_tokens": 1000}
    for index in range(50):
        engines.start(FakeLive(str(index), prompt=5))
    assert len(engines.started) == 50


async def test_a_turn_costs_microseconds_when_there_is_room() -> None:
    engines = Engines(room=1 << 30)
    lives = [FakeLive(str(number)) for number in range(500)]
    costs = []
    for _ in range(5):
        begin = time.perf_counter()
        for live in lives:
            engines.start(live).leave()
        costs.append((time.perf_counter() - begin) / len(lives))
    print(f"a turn with room: {min(costs) * 1e6:.1f} us")
    assert min(costs) < 200e-6
    assert statistics.median(costs) < 1e-3
