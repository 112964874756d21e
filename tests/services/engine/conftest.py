"""Engine processes that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.services.engine.process import EngineProcess


@pytest.fixture
def engine() -> Iterator[Callable[..., EngineProcess]]:
    processes: list[EngineProcess] = []

    def begin(*flags: object, mood: str | None = None) -> EngineProcess:
        processes.append(EngineProcess(*flags, mood=mood))
        return processes[-1]

    yield begin
    for process in processes:
        process.popen.kill()
        process.popen.wait()
        if process.popen.stderr is not None:
            process.popen.stderr.close()
