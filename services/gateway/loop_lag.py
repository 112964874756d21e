"""How late the event loop comes to what is due: what every stream waits for. Knows no request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PERIOD_S = 0.25


async def watch_lag(observe: Callable[[float], object], *, period_s: float = PERIOD_S) -> None:
    """Sleep `period_s` again and again and give `observe` the seconds by which each sleep was too long. Runs
    until cancelled.
    """
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + period_s
        await asyncio.sleep(period_s)
        observe(max(0.0, loop.time() - due))
