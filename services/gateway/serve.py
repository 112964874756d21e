"""The command `serve`: configuration, logs, keys, and the server. Wiring only."""

from __future__ import annotations

import asyncio
import dataclasses
import gc

from services.gateway.application import GatewayApplication
from services.gateway.config import GatewayConfig, load
from services.gateway.processes import PortTaken, end_with_parent, launch
from weft import logs
from weft.config import effective
from weft.rpc.address import Address
from weft.rpc.guard import guard_of
from weft.rpc.server import BindError, Server, serve
from weft.usage import tell_usage

log = logs.get_logger("gateway")
PROGRAM = "python -m services.gateway"


# Fewer collections than by default: a token leaves nothing for them to find, a request about 40 objects.
GC_THRESHOLDS = (10_000, 20, 10)


class _Process(GatewayApplication):
    """The application that has a process for itself."""

    async def load(self, server: Server) -> None:
        """As it is; then what was loaded is put out of the collector's sight, for it stays."""
        await super().load(server)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)


async def _run(config: GatewayConfig) -> int:
    guard = guard_of(config)
    engine_key = None
    if config.engine_api_key_file is not None:
        engine_key = config.engine_api_key_file.read_text(encoding="ascii").strip()
    application = _Process(
        config, authenticator=guard.authenticator, engine_api_key=engine_key, tls=guard.tls
    )
    return await serve(
        application, config.listen, is_public=True, guard=guard, shares_port=config.processes > 1
    )


def _of_process(config: GatewayConfig) -> GatewayConfig:
    """What differs between the processes of one gateway: ports that cannot be shared."""
    index = config.process_index or 0
    return dataclasses.replace(
        config, admin=_plus(config.admin, index), process_http=_plus(config.process_http, index)
    )


def _plus(address: Address | None, index: int) -> Address | None:
    return None if address is None else address._replace(port=address.port + index)


def main(argv: list[str]) -> int:
    """Serve until a signal. Exit code 0 after a drain, 1 when it cannot start, 2 on a bad flag."""
    if argv[:1] != ["serve"]:
        return tell_usage(PROGRAM, argv)
    config = load(argv[1:])
    logs.start(config.log_level, is_private=True)
    if config.processes > 1:
        if config.process_index is None:
            return _launch(argv[1:], config)
        if config.launcher_pid is not None:
            end_with_parent(config.launcher_pid)
        config = _of_process(config)
    log.info("configuration", **effective(config))
    try:
        return asyncio.run(_run(config))
    except (BindError, OSError, ValueError) as error:
        log.error("cannot start", reason=str(error))
        return 1


def _launch(argv: list[str], config: GatewayConfig) -> int:
    try:
        reloads = config.api_key_file is not None or config.tls_cert is not None
        return launch(
            argv, config.processes, config.listen, config.http, module="services.gateway", reloads=reloads
        )
    except PortTaken as error:
        log.error("cannot start", reason=str(error))
        return 1
