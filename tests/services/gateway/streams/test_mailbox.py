"""The mailbox by itself: order, bounds, and what becomes of those who wait when a write fails."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.streams.mailbox import Mailbox
from weft.v1 import gateway_service_pb2 as pb


class Broken(Exception):
    """A write failed."""


async def test_a_failed_write_reaches_everybody_who_waits() -> None:
    """Whose message was in the write, who was behind it, who had no room, and who comes later."""
    go = asyncio.Event()

    async def write(message: pb.MultiplexResponse) -> None:
        await go.wait()
        raise Broken

    mailbox = Mailbox(write)
    small = pb.MultiplexResponse(stream_id=1)
    large = pb.MultiplexResponse(stream_id=2)
    large.response.delta.text = "x" * (40 << 10)
    running = asyncio.create_task(mailbox.run())
    putters = [asyncio.create_task(mailbox.put_last(message)) for message in (small, large, small)]
    putters.append(asyncio.create_task(mailbox.put(small)))
    await asyncio.sleep(0.01)
    assert not any(putter.done() for putter in putters)
    go.set()
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(running, *putters, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Broken] * 5
    with pytest.raises(Broken):
        await mailbox.put(small)
