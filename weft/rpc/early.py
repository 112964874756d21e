"""Signals before there is a server. Standard library only: it comes before what takes long to import.

Nothing has begun yet, so nothing is drained: the process ends at once, and well, as it would a second later.
"""

from __future__ import annotations

import os
import signal


def leave_on_signals() -> None:
    """SIGTERM and SIGINT end the process with code 0, until `weft.rpc.server.serve` takes them over."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
