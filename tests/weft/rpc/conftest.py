"""The probe service on a real server, and the balance of calls after each test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from tests.weft.rpc.probe_service import SERVICE, ProbeService
from weft.rpc.address import Address
from weft.rpc.auth import Authenticator
from weft.rpc.interceptor import RpcCounters
from weft.rpc.server import Server


@pytest.fixture
def probe_service() -> ProbeService:
    return ProbeService()


@pytest.fixture
def keys() -> Authenticator | None:
    """Override by parametrizing: the keys of the server."""
    return None


@pytest.fixture
async def probe_server(probe_service: ProbeService, keys: Authenticator | None) -> AsyncIterator[Server]:
    server = Server((SERVICE,), authenticator=keys)
    probe_service.register(server.grpc)
    await server.start(Address("127.0.0.1", 0))
    server.set_serving()
    yield server
    await server.stop(0)


@pytest.fixture
async def probe_channel(probe_server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(str(probe_server.address)) as channel:
        yield channel


@pytest.fixture(autouse=True)
async def balanced_counters() -> AsyncIterator[None]:
    """After each test as many calls have ended as have begun, on every server."""
    yield
    for _ in range(1000):
        if all(counters.begun == counters.ended for counters in RpcCounters.instances):
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"calls in progress: {[(c.begun, c.ended) for c in RpcCounters.instances]}")
