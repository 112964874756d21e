"""Fixtures that every test may use. Ask for one by name; nothing here starts a service or imports torch."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported anywhere: more threads than the few cores of a test machine only slow it down.
THREADS_ARE_GIVEN = "OMP_NUM_THREADS" in os.environ
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Waiting threads that spin take the cores from the processes they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A shell lets what it starts in the background ignore Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
_SCHEDULE = pytest.StashKey[Any]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What imports and collection have made stays. A collector that walks all of it takes 0.3 s,
    and an engine asks for one whenever it has loaded.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` stands for."""
    from tests.schedule import num_workers

    has_affinity = hasattr(os, "sched_getaffinity")
    return num_workers(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Worker processes are as many as the cores already: one thread each."""
    if not THREADS_ARE_GIVEN:
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files to worker processes in an order of our own, whatever `--dist` says."""
    from tests.schedule import ScheduleByFile

    schedule = config.stash[_SCHEDULE] = ScheduleByFile(config, log)
    return schedule


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run in several processes that has left tests out has not just failed some: it has no result."""
    schedule = session.config.stash.get(_SCHEDULE, None)
    has_result = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if schedule is None or schedule.is_complete or not has_result:
        return
    session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
    if (reporter := session.config.pluginmanager.getplugin("terminalreporter")) is not None:
        reporter.ensure_newline()
        reporter.write_line("not every test was run: workers died, or did not collect the same", red=True)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Any:
    """What a test logs may hold halves of characters; the wire between processes takes whole ones, and a
    worker whose report it refuses is lost with all that it had still to do.
    """
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_encodable(item) for item in value)
    return value


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def demo_model(root: Path) -> Path:
    """The committed demo checkpoint, a Hugging Face directory."""
    return root / "models" / "demo"
