"""The command `serve`: configuration, logs, keys, and the server. Wiring only."""

from __future__ import annotations

import asyncio

from services.engine.application import EngineApplication
from services.engine.config import EngineConfig, load
from weft import logs
from weft.artifact.manifest import ArtifactError, DigestMismatch
from weft.config import effective, let_waiting_threads_sleep
from weft.rpc.guard import guard_of
from weft.rpc.server import BindError, serve
from weft.usage import tell_usage

log = logs.get_logger("engine")
PROGRAM = "python -m services.engine"


async def _run(config: EngineConfig) -> int:
    return await serve(EngineApplication(config), config.listen, guard=guard_of(config))


def main(argv: list[str]) -> int:
    """Serve until a signal. Exit code 0 after a drain, 1 when it cannot start, 2 on a bad flag, 70 on a
    fault.
    """
    if argv[:1] != ["serve"]:
        return tell_usage(PROGRAM, argv)
    let_waiting_threads_sleep()
    config = load(argv[1:])
    logs.start(config.log_level)
    log.info("configuration", **effective(config))
    try:
        return asyncio.run(_run(config))
    except DigestMismatch as error:
        log.error(
            "cannot start",
            status="DATA_LOSS",
            reason=str(error),
            file=error.file,
            expected=error.expected,
            found=error.found,
        )
    except (BindError, ArtifactError, OSError, ValueError, MemoryError) as error:
        log.error("cannot start", reason=str(error) or type(error).__name__)
    except Exception as error:
        log.failure("cannot start", error)
    return 1
