"""A service to start as a process: `fake_service.py ADDRESS LOAD_SECONDS DRAIN_SECONDS [fault|fail]`."""

from __future__ import annotations

import asyncio
import sys
import time

from weft import logs
from weft.rpc.address import parse_address
from weft.rpc.server import BindError, Server, exit_process, in_daemon_thread, serve


class FakeService:
    """Loads and drains for as long as it is told."""

    service_names = ("test.v1.FakeService",)

    def __init__(self, load_s: float, drain_s: float, mode: str) -> None:
        self._load_s, self._drain_s, self._mode = load_s, drain_s, mode

    async def load(self, server: Server) -> None:
        # Cannot be interrupted, like a real load.
        await in_daemon_thread(lambda: time.sleep(self._load_s), "load")
        if self._mode == "fail":
            raise FileNotFoundError("nothing to load")
        if self._mode == "fault":
            asyncio.get_running_loop().call_later(0.3, server.request_stop, 70)

    async def drain(self) -> None:
        logs.get_logger("fake").info("draining")
        await asyncio.sleep(self._drain_s)
        logs.get_logger("fake").info("drained")

    async def close(self) -> None:
        logs.get_logger("fake").info("closed")


if __name__ == "__main__":
    logs.start()
    service = FakeService(float(sys.argv[2]), float(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else "")
    code = 1
    try:
        code = asyncio.run(serve(service, parse_address(sys.argv[1])))
    except (FileNotFoundError, BindError) as error:
        logs.get_logger("fake").error("cannot start", reason=str(error))
    exit_process(code)
