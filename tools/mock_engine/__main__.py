"""`python -m tools.mock_engine serve`: the mock engine as a process. Wiring only.

SIGUSR2 makes the next step hang for --hang-seconds, or until another SIGUSR2. SIGRTMIN makes it end in a
fault of the device, which ends the process. Everything else is a real engine's.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from tools.mock_engine.config import MockConfig, load
from tools.mock_engine.engine import make_application, make_runner
from weft import logs
from weft.config import effective
from weft.rpc.guard import guard_of
from weft.rpc.server import exit_process, serve
from weft.usage import tell_usage

log = logs.get_logger("mock_engine")
PROGRAM = "python -m tools.mock_engine"


async def _run(config: MockConfig) -> int:
    runner = make_runner(config)
    signal.signal(signal.SIGRTMIN, lambda *_: runner.break_next())
    signal.signal(signal.SIGUSR2, lambda *_: runner.release() if runner.is_hanging else runner.hang_next())
    return await serve(make_application(config, runner), config.listen, guard=guard_of(config))


def main(argv: list[str]) -> int:
    """Serve until a signal. Exit codes are a real engine's."""
    if argv[:1] != ["serve"]:
        return tell_usage(PROGRAM, argv)
    config = load(argv[1:])
    logs.start(config.log_level)
    log.info("configuration", **effective(config))
    try:
        return asyncio.run(_run(config))
    except Exception as error:
        log.error("cannot start", reason=str(error) or type(error).__name__)
    return 1


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
