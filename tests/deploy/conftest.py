"""One engine and one gateway for all tests that ask what services export."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.running import Families, Running, families_of, started, use


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    with started() as services:
        codes = use(services)
        assert codes["OK"] > 2
        assert codes["RESOURCE_EXHAUSTED"] > 0
        yield services


@pytest.fixture(scope="session")
def exported(running: Running) -> dict[str, Families]:
    """What engine and gateway export, by service."""
    return {service: families_of(text) for service, text in running.scrape().items()}
