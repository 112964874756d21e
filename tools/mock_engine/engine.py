"""The mock engine inside a test's own process."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from typing import Any

from services.engine.application import EngineApplication
from services.engine.config import EngineConfig
from services.engine.core.engine_core import EngineCore
from services.engine.runner.config import RunnerInfo
from tools.mock_engine.config import MockConfig
from tools.mock_engine.runner import HashRunner
from weft.rpc.address import Address
from weft.rpc.guard import guard_of
from weft.rpc.server import Server

KILL_TIMEOUT_S = 5.0


def make_runner(config: MockConfig) -> HashRunner:
    """The runner that a configuration describes."""
    return HashRunner(
        config.num_blocks,
        config.block_size,
        step_s=config.step_ms / 1e3,
        token_s=config.token_us / 1e6,
        hang_s=config.hang_seconds,
        vocabulary=config.vocabulary,
    )


def make_application(config: MockConfig, runner: HashRunner) -> EngineApplication:
    """The real application around a runner."""

    def load_model(_: EngineConfig) -> tuple[HashRunner, RunnerInfo]:
        return runner, config.info()

    return EngineApplication(config.engine(), load_model=load_model)


class MockEngine:
    """`async with MockEngine(step_ms=1, num_blocks=64) as engine:` serves at `engine.address`.

    The fields of `MockConfig` are its arguments. `core` belongs to the engine's thread: read it when nothing
    runs. `start` and `kill` may alternate: an engine that was killed starts again at the same address.
    """

    def __init__(self, config: MockConfig | None = None, **fields: Any) -> None:
        self.config = replace(config or MockConfig(), **fields)
        self.runner = make_runner(self.config)
        self.address: Address = self.config.listen
        self.server: Server | None = None
        self._application: EngineApplication | None = None

    @property
    def core(self) -> EngineCore:
        """The engine's core. Raises RuntimeError while it does not serve."""
        return self.application.core

    @property
    def application(self) -> EngineApplication:
        """The real application. Raises RuntimeError while it does not serve."""
        if self._application is None:
            raise RuntimeError("the engine does not serve")
        return self._application

    async def start(self) -> None:
        """Serve. Raises BindError."""
        self.runner = make_runner(self.config)
        application = make_application(self.config, self.runner)
        guard = guard_of(self.config)
        server = Server(
            application.service_names,
            authenticator=guard.authenticator,
            tls=guard.tls,
            limits=guard.limits,
        )
        await server.start(self.address)
        self.address = server.address
        thresholds = gc.get_threshold()
        await application.load(server)
        # The application tunes the collector of a process of its own; this one is somebody else's.
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        server.set_serving()
        self.server, self._application = server, application

    async def kill(self) -> None:
        """Gone at once: every call is broken off, nothing is said."""
        server, self.server = self.server, None
        application, self._application = self._application, None
        self.runner.release()
        if server is not None:
            await server.stop(0)
        if application is not None:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await application.close()

    async def drain(self) -> None:
        """As after SIGTERM, without the end: what runs may finish within --drain-seconds."""
        if self.server is not None:
            self.server.set_not_serving()
        await self.application.drain()

    async def __aenter__(self) -> MockEngine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
