"""One gateway and one engine a module, bystanders on both, and the checks after every test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.hostile.hostile_stack import Stack, running_stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """Shared by a module's tests; its `FLAGS` are the gateway's, and sessions are kept. At its end nothing
    may be left, and no INTERNAL may have been sent.
    """
    sessions = tmp_path_factory.mktemp("sessions") / "sessions.sqlite"
    async with running_stack(sessions=sessions, **getattr(request.module, "FLAGS", {})) as stack:
        stack.begin_bystanders()
        yield stack
        await stack.end_bystanders()
        stack.check_bystanders()
        await stack.idle()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=stack.url, timeout=20) as client:
        yield client
