"""One engine and one gateway for all tests that ask what services export."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.running import Families, Running, families_of, started, use


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    with started() as services:
        for _ in range(5):  # on a machine that stalls they may come one after the other, and none waits
            assert use(services).get("OK", 0) > 0
            if "weft_gateway_queue_seconds_count" in services.scrape()["gateway"]:
                break
        yield services


@pytest.fixture(scope="session")
def exported(running: Running) -> dict[str, Families]:
    """What engine and gateway export, by service."""
    return {service: families_of(text) for service, text in running.scrape().items()}
