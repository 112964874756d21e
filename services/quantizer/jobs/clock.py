"""The two clocks of the job service. What is decided by time goes by `Clock.now`, which no one can set:
seconds since the machine started, sleep included, good for as long as `Clock.boot` stays the same.
`Clock.wall_ms` is for people to read.
"""

from __future__ import annotations

import time
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Clock:
    """The machine's clocks."""

    def __init__(self) -> None:
        try:
            self.boot = _BOOT_ID.read_text(encoding="ascii").strip()
        except OSError:
            # Without the kernel's word a restart of the machine looks like a clock that went back.
            self.boot = "unknown"

    def now(self) -> float:
        """Seconds since the machine started."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def wall_ms(self) -> int:
        """Milliseconds since 1970, as the wall clock has it now."""
        return time.time_ns() // 1_000_000
