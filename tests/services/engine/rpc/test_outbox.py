"""The queue of a link alone: order, credit, bounds. hypothesis chooses what happens when."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.core.errors import QueueFull
from services.engine.core.events import FinishedEvent, TokenEvent, Tokens
from services.engine.core.sequence import FinishReason
from services.engine.loop import Heartbeat, LinkEvents
from services.engine.rpc.outbox import MAX_FRAME_BYTES, Outbox
from weft.rpc.errors import StatusError


def tokens(*rows: tuple[int, TokenEvent]) -> Tokens:
    return Tokens.of(event._replace(key=slot) for slot, event in rows)


def token(position: int, *, token_id: int = 2**32 - 1, num_top: int | None = None) -> TokenEvent:
    top = () if num_top is None else tuple((2**32 - 1 - i, -1.5) for i in range(num_top))
    return TokenEvent(None, token_id, position, None if num_top is None else -0.5, top, None, 0.01)


def end(error=None) -> FinishedEvent:
    huge = 2**31
    return FinishedEvent(None, FinishReason.ERROR, huge, huge, huge, 1e9, 1e9, 1e9, huge, error)


def test_replies_then_a_heartbeat_then_frames():
    outbox = Outbox(9, 1 << 20)
    outbox.add(LinkEvents(1, tokens=tokens((0, token(0)))))
    outbox.beat(Heartbeat(1, 0.5, 2.0))
    outbox.beat(Heartbeat(2, 0.25, 2.0))
    outbox.add(
        LinkEvents(2, accepted=[1], rejected=[(2, QueueFull("full", 1.0))], tokens=tokens((0, token(1))))
    )
    messages = []
    while (message := outbox.next_message()) is not None:
        messages.append(message)
    kinds = [message.WhichOneof("event") for message in messages]
    assert kinds == ["accepted", "rejected", "heartbeat", "frame"]
    assert messages[2].heartbeat.step == 2
    assert messages[2].heartbeat.step_elapsed_ms == 250
    frame = messages[3].frame
    assert (frame.epoch, frame.step, list(frame.positions)) == (9, 2, [0, 1])


def test_an_end_follows_its_tokens_even_when_credit_splits_them():
    outbox = Outbox(1, 0)
    outbox.add(LinkEvents(1, tokens=tokens(*((5, token(i)) for i in range(20))), finished=[(5, end())]))
    positions, ends = [], 0
    while outbox.num_pending:
        outbox.add_credit(30)
        while (message := outbox.next_message()) is not None:
            assert not ends
            positions += message.frame.positions
            ends += len(message.frame.finished)
    assert positions == list(range(20))
    assert ends == 1


def test_a_pile_is_sent_in_frames_of_bounded_size(monkeypatch):
    monkeypatch.setattr("services.engine.rpc.outbox.MAX_PENDING_BYTES", 1 << 30)
    outbox = Outbox(1, 1 << 40)
    count = 60_000
    outbox.add(LinkEvents(1, tokens=tokens(*((0, token(i, num_top=20)) for i in range(count)))))
    seen = 0
    while (message := outbox.next_message()) is not None:
        assert message.ByteSize() <= MAX_FRAME_BYTES
        seen += len(message.frame.slots)
    assert seen == count


def test_bounds(monkeypatch):
    monkeypatch.setattr("services.engine.rpc.outbox.MAX_PENDING_BYTES", 150)
    outbox = Outbox(1, 0)
    outbox.add(LinkEvents(1, tokens=tokens(*((0, token(i)) for i in range(10)))))
    with pytest.raises(StatusError) as caught:
        outbox.add(LinkEvents(1, tokens=tokens((0, token(10)))))
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    monkeypatch.setattr("services.engine.rpc.outbox.MAX_PENDING_REPLIES", 3)
    outbox = Outbox(1, 0)
    outbox.add(LinkEvents(1, accepted=[1, 2, 3]))
    with pytest.raises(StatusError):
        outbox.add(LinkEvents(1, accepted=[4]))


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("tokens"), st.integers(0, 3), st.integers(1, 5), st.sampled_from([None, 0, 3])),
        st.tuples(st.just("end"), st.integers(0, 3)),
        st.tuples(st.just("credit"), st.integers(0, 400)),
        st.tuples(st.just("send")),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(ACTIONS, st.integers(0, 300))
def test_whatever_happens_nothing_is_lost_and_credit_is_kept(actions, credit):
    outbox = Outbox(1, credit)
    granted, sent = credit, 0
    queued: dict[int, list[object]] = {slot: [] for slot in range(4)}
    got: dict[int, list[object]] = {slot: [] for slot in range(4)}

    def send() -> None:
        nonlocal sent
        while (message := outbox.next_message()) is not None:
            frame = message.frame
            sent += frame.ByteSize()
            assert frame.slots or frame.finished
            for slot, position in zip(frame.slots, frame.positions, strict=True):
                got[slot].append(position)
            for finished in frame.finished:
                got[finished.slot].append("end")
        assert sent <= granted

    for action, *arguments in actions:
        if action == "tokens":
            slot, count, num_top = arguments
            if "end" not in queued[slot]:
                first = len(queued[slot])
                new = [(slot, token(first + i, num_top=num_top)) for i in range(count)]
                queued[slot] += range(first, first + count)
                outbox.add(LinkEvents(1, tokens=tokens(*new)))
        elif action == "end":
            if "end" not in queued[arguments[0]]:
                queued[arguments[0]].append("end")
                outbox.add(LinkEvents(1, finished=[(arguments[0], end(QueueFull("x" * 300, 1.0)))]))
        elif action == "credit":
            granted += arguments[0]
            outbox.add_credit(arguments[0])
        else:
            send()
    granted += 1 << 20
    outbox.add_credit(1 << 20)
    send()
    assert got == queued
    assert not outbox.num_pending
