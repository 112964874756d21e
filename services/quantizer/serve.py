"""`python -m services.quantizer serve`: the job service. Wiring only; loads nothing."""

# ruff: noqa: RUF009 - `option` makes a dataclass field

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.quantizer.config import ENV_PREFIX
from services.quantizer.rpc.servicer import SERVICE_NAME, QuantizerServicer
from weft import logs
from weft.config import effective, load_config, option
from weft.rpc.address import Address, parse_address
from weft.rpc.auth import Authenticator
from weft.rpc.server import BindError, Server, serve
from weft.v1.quantizer_service_pb2_grpc import add_QuantizerServiceServicer_to_server

_LOGGER = logs.get_logger("quantizer")


@dataclass(frozen=True)
class ServeConfig:
    """Flags of `serve`."""

    listen: Address = option(
        parse_address("127.0.0.1:50053"), "address to listen on", parse=parse_address, metavar="HOST:PORT"
    )
    api_key_file: Path | None = option(
        None, "file of hashed API keys; without it everybody may call", metavar="FILE"
    )


class QuantizerApplication:
    """What `weft.rpc.server.serve` runs."""

    service_names: Sequence[str] = (SERVICE_NAME,)

    async def load(self, server: Server) -> None:
        """Register the servicer; there is nothing to get ready."""
        add_QuantizerServiceServicer_to_server(QuantizerServicer(), server.grpc)

    async def drain(self) -> None:
        """No call lasts."""

    async def close(self) -> None:
        """Nothing is held."""


def main(flags: Sequence[str], prog: str) -> int:
    """Serve until a signal. Exit status 0 after one, 1 when it cannot start, 2 on a bad flag (SystemExit)."""
    config = load_config(
        ServeConfig, flags, prog=prog, env_prefix=ENV_PREFIX, description="The job service over gRPC."
    )
    logs.start()
    _LOGGER.info("configuration", **effective(config))
    try:
        keys = Authenticator.from_file(config.api_key_file) if config.api_key_file else None
        return asyncio.run(serve(QuantizerApplication(), config.listen, authenticator=keys))
    except (BindError, OSError, ValueError) as error:
        _LOGGER.error("cannot start", reason=str(error) or type(error).__name__)
        return 1
    finally:
        logs.stop()
