"""An event that happens once, for several who wait and one who gave up waiting."""

from __future__ import annotations

import asyncio

from services.gateway.streams.one_shot import OneShot


async def test_all_who_wait_go_on_and_nobody_waits_afterwards() -> None:
    event = OneShot()
    waiting = [asyncio.create_task(event.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert not event.is_set()
    event.set()
    event.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting[1:])
        await event.wait()
    assert event.is_set()
    assert waiting[0].cancelled()
