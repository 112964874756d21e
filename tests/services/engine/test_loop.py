"""The engine's thread: links, slots, ends, faults, and an idle loop that costs nothing."""

from __future__ import annotations

import random
import threading
import time

import pytest

from services.engine.core.errors import Draining, DuplicateRequest, InvalidRequest
from services.engine.core.sequence import FinishReason
from services.engine.loop import EngineLoop, EngineUnavailable
from tests.services.engine.core.oracle import expected_output, make_core, make_sequence, output_of


class Client:
    """One link, as a careful gateway would keep it."""

    def __init__(self, loop):
        self.loop = loop
        self.accepted, self.rejected, self.tokens, self.ends = [], {}, {}, {}
        self.changed = threading.Condition()
        self.link_id = loop.open_link(self.deliver)

    def deliver(self, events):
        with self.changed:
            self.accepted += events.accepted
            self.rejected.update(events.rejected)
            for token in events.tokens:
                slot = token.key
                assert slot not in self.ends, "a token after the end"
                assert token.position not in self.tokens.setdefault(slot, {}), "a position twice"
                self.tokens[slot][token.position] = token.token_id
            for slot, end in events.finished:
                assert slot not in self.ends, "two ends"
                self.ends[slot] = end
            self.changed.notify_all()

    def wait(self, condition, timeout_s=10.0):
        with self.changed:
            assert self.changed.wait_for(condition, timeout_s), (self.tokens, self.ends, self.rejected)


@pytest.fixture(params=[False, True], ids=["serial", "overlap"])
def start(request):
    """Starts loops over fresh cores; stops them and balances their counters afterwards."""
    started = []

    def begin(*, on_fault=None, observe=None, **limits):
        faults = []
        core, runner = make_core(clock=time.monotonic, overlap=request.param, **limits)
        loop = EngineLoop(core, on_fault=on_fault or faults.append, observe=observe)
        loop.start()
        started.append((loop, core))
        return loop, core, runner

    yield begin
    for loop, core in started:
        loop.stop()
        core.check_integrity()
        counters = core.report().counters
        assert counters.begun == counters.ended
        assert core.blocks.counts().active == 0


def test_streams_of_several_links_stay_apart(start):
    loop, _, _ = start(num_blocks=64)
    clients = [Client(loop) for _ in range(3)]
    sequences = {}
    for i, client in enumerate(clients):
        for slot in range(4):
            sequences[i, slot] = make_sequence(None, [i, slot, 5], max_tokens=8, seed=i * 10 + slot)
            loop.submit(client.link_id, slot, sequences[i, slot])
    for i, client in enumerate(clients):
        client.wait(lambda client=client: len(client.ends) == 4)
        assert sorted(client.accepted) == [0, 1, 2, 3]
        for slot in range(4):
            assert output_of(client.tokens, slot) == expected_output(sequences[i, slot])


def test_a_refusal_is_the_slots_own(start):
    loop, _, _ = start(num_blocks=600)
    client = Client(loop)
    loop.submit(client.link_id, 0, make_sequence(None, []))
    loop.submit(client.link_id, 1, make_sequence(None, [1], max_tokens=2000))
    loop.submit(client.link_id, 1, make_sequence(None, [2], max_tokens=3))
    client.wait(lambda: len(client.rejected) == 2 and 1 in client.ends)
    assert isinstance(client.rejected[0], InvalidRequest)
    assert isinstance(client.rejected[1], DuplicateRequest)
    assert len(client.tokens[1]) == 2000


def test_closing_a_link_cancels_all_of_it_and_nothing_else(start):
    loop, _, _ = start(num_blocks=2600)
    leaving, staying = Client(loop), Client(loop)
    loop.submit(leaving.link_id, 7, make_sequence(None, [1], max_tokens=9000))
    sequence = make_sequence(None, [2], max_tokens=60)
    loop.submit(staying.link_id, 7, sequence)
    leaving.wait(lambda: leaving.tokens)
    loop.close_link(leaving.link_id)
    loop.submit(leaving.link_id, 8, make_sequence(None, [3]))
    staying.wait(lambda: 7 in staying.ends)
    assert output_of(staying.tokens, 7) == expected_output(sequence)
    assert not leaving.ends


def test_cancel_pause_and_resume(start):
    loop, _, _ = start(num_blocks=2600)
    client = Client(loop)
    loop.submit(client.link_id, 0, make_sequence(None, [1], max_tokens=9000))
    client.wait(lambda: client.tokens.get(0))
    loop.pause(client.link_id, 0)
    time.sleep(0.1)
    held = len(client.tokens[0])
    time.sleep(0.15)
    assert len(client.tokens[0]) == held
    loop.resume(client.link_id, 0)
    client.wait(lambda: len(client.tokens[0]) > held)
    loop.cancel(client.link_id, 0)
    client.wait(lambda: 0 in client.ends)
    assert client.ends[0].reason is FinishReason.CANCELLED


def test_drain_refuses_the_new_and_ends_the_old_at_the_deadline(start):
    loop, _, _ = start(num_blocks=2600)
    client = Client(loop)
    loop.submit(client.link_id, 0, make_sequence(None, [1], max_tokens=3))
    loop.submit(client.link_id, 1, make_sequence(None, [2], max_tokens=9000))
    client.wait(lambda: 0 in client.ends and client.tokens.get(1))
    loop.drain(0.2)
    loop.submit(client.link_id, 2, make_sequence(None, [3]))
    client.wait(lambda: 2 in client.rejected)
    assert isinstance(client.rejected[2], Draining)
    assert loop.is_draining
    client.wait(lambda: 1 in client.ends)
    assert client.ends[1].reason is FinishReason.CANCELLED
    assert loop.num_live == 0


def test_a_device_fault_ends_everything_and_is_told_once(start):
    faults = []
    loop, _, runner = start(on_fault=faults.append, num_blocks=2600)
    client = Client(loop)
    runner.fail["forward", (client.link_id, 1)] = RuntimeError("CUDA error: unspecified launch failure")
    loop.submit(client.link_id, 0, make_sequence(None, [1], max_tokens=9000))
    loop.submit(client.link_id, 1, make_sequence(None, [2], max_tokens=100))
    client.wait(lambda: len(client.ends) == 2)
    assert all(isinstance(end.error, EngineUnavailable) for end in client.ends.values())
    assert len(faults) == 1


def test_a_bug_in_the_scheduler_is_a_fault_too(start, monkeypatch):
    faults = []
    loop, core, _ = start(on_fault=faults.append)
    client = Client(loop)
    monkeypatch.setattr(core.scheduler, "schedule", lambda now: 1 / 0)
    loop.submit(client.link_id, 0, make_sequence(None, [1]))
    client.wait(lambda: 0 in client.ends)
    assert isinstance(faults[0], ZeroDivisionError)


def test_a_delivery_that_fails_closes_its_link_alone(start):
    loop, _, _ = start()
    client = Client(loop)

    def broken(events):
        raise RuntimeError("planted")

    link_id = loop.open_link(broken)
    loop.submit(link_id, 0, make_sequence(None, [1], max_tokens=50))
    sequence = make_sequence(None, [2], max_tokens=50)
    loop.submit(client.link_id, 0, sequence)
    client.wait(lambda: 0 in client.ends)
    assert output_of(client.tokens, 0) == expected_output(sequence)


@pytest.mark.parametrize("state", ["empty", "all paused"])
def test_an_idle_loop_uses_no_processor(start, state):
    loop, _, _ = start(num_blocks=10)
    client = Client(loop)
    if state != "empty":
        loop.submit(client.link_id, 0, make_sequence(None, list(range(20)), max_tokens=20))
        client.wait(lambda: client.tokens.get(0))
        loop.pause(client.link_id, 0)
        time.sleep(0.1)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.03


def test_heartbeat_tells_a_running_step_from_a_rest(start):
    loop, core, runner = start()
    client = Client(loop)
    assert loop.heartbeat().step_elapsed_s == 0.0
    entered, leave = threading.Event(), threading.Event()
    stage = "collect" if core.has_overlap else "forward"
    real = getattr(runner, stage)

    def hanging(argument):
        entered.set()
        leave.wait(10)
        return real(argument)

    setattr(runner, stage, hanging)
    loop.submit(client.link_id, 0, make_sequence(None, [1], max_tokens=1))
    assert entered.wait(5)
    time.sleep(0.05)
    beat = loop.heartbeat()
    assert beat.step_elapsed_s >= 0.05
    assert beat.step_bound_s > beat.step_elapsed_s
    leave.set()
    client.wait(lambda: 0 in client.ends)


def test_two_hundred_random_cancels_and_disconnects_leak_nothing(start):
    rng = random.Random(5)
    loop, core, _ = start(num_blocks=24, max_batch_size=6)
    steady = Client(loop)
    expected = {}
    for i in range(200):
        client = Client(loop)
        loop.submit(
            client.link_id, 1, make_sequence(None, [rng.randrange(9)] * rng.randint(1, 20), max_tokens=40)
        )
        if i % 20 == 0:
            expected[i] = make_sequence(None, [i % 90, 3], max_tokens=10, seed=i)
            loop.submit(steady.link_id, i, expected[i])
        time.sleep(rng.choice([0, 0, 0.001, 0.004]))
        (loop.cancel(client.link_id, 1) if rng.random() < 0.5 else loop.close_link(client.link_id))
    steady.wait(lambda: len(steady.ends) == len(expected))
    for slot, sequence in expected.items():
        assert output_of(steady.tokens, slot) == expected_output(sequence)
    deadline = time.monotonic() + 10
    while loop.num_live and time.monotonic() < deadline:
        time.sleep(0.01)
    counts = core.blocks.counts()
    assert counts.active == 0
    assert counts.free + counts.cached == 24


def test_metrics_see_every_token_and_end(start):
    reports = []
    loop, _, _ = start(observe=reports.append)
    client = Client(loop)
    for slot in range(5):
        loop.submit(client.link_id, slot, make_sequence(None, [slot], max_tokens=4))
    client.wait(lambda: len(client.ends) == 5)
    loop.stop()
    assert sum(len(report.tokens) for report in reports) == 20
    assert sum(len(report.finished) for report in reports) == 5
    assert sum(token.ttft_s is not None for report in reports for token in report.tokens) == 5


@pytest.mark.parametrize("start", [True], indirect=True)
def test_tokens_are_delivered_while_the_next_step_is_on_the_device(start):
    """No token waits for a step that it does not depend on."""
    loop, _, runner = start()
    client = Client(loop)
    delivered, collect = [], runner.collect

    def waiting(launched):
        # By the time that the host waits for this step, what all steps before the last brought is delivered.
        delivered.append(len(client.tokens.get(0, ())))
        return collect(launched)

    runner.collect = waiting
    loop.submit(client.link_id, 0, make_sequence(None, [1], max_tokens=6))
    client.wait(lambda: 0 in client.ends)
    assert delivered == [0, 1, 2, 3, 4, 5]
