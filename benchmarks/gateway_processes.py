"""Processes of the gateway's benchmark: started, found listening, looked at in /proc, stopped.

Knows how to start an engine, a gateway and a client; not what is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_S = 60.0
STOP_S = 20.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """User and system time of a process and its threads so far, in seconds; ticks of 10 ms.
    Raises OSError when it is gone.
    """
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def rss_bytes(pid: int) -> int:
    """Resident memory of a process. Raises OSError when it is gone."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES


class Service:
    """One process that logs JSON lines on standard error; its events are kept."""

    def __init__(self, module: str, *arguments: object) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.tail: list[str] = []
        self._seen: queue.Queue[str] = queue.Queue()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def address(self, event: str = "listening") -> str:
        """The address that an event told."""
        return str(self.events[event]["address"])

    def wait_for(self, event: str) -> None:
        """Return when the process has logged `event`. Raises RuntimeError with its last lines."""
        until = time.monotonic() + START_S
        while event not in self.events:
            with contextlib.suppress(queue.Empty):
                self._seen.get(timeout=0.2)
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"no {event!r} from {self.process.args!r}: {self.tail[-5:]}")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when it does not go."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.tail = [*self.tail[-20:], line.rstrip()]
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                self.events.setdefault(record["event"], record)
                self._seen.put(record["event"])


@contextlib.contextmanager
def engine(kind: str, **flags: object) -> Iterator[Service]:
    """An engine of `benchmarks.gateway_engines`. Flags by their names, `_` for `-`."""
    service = Service("benchmarks.gateway_engines", kind, *_flags(flags))
    try:
        service.wait_for("serving")
        yield service
    finally:
        service.stop()


@contextlib.contextmanager
def gateway(engine_address: str, *, module: str = "services.gateway", **flags: object) -> Iterator[Service]:
    """A gateway in front of an engine, with HTTP for its metrics."""
    fixed = {
        "listen": "127.0.0.1:0",
        "http": "127.0.0.1:0",
        "engine": engine_address,
        "tokenizer": "models/demo",
        "max_live_requests": 20_000,
        "max_waiting_requests": 20_000,
        "drain_seconds": 0,
    }
    service = Service(module, "serve", *_flags({**fixed, **flags}))
    try:
        service.wait_for("serving")
        yield service
    finally:
        service.stop()


def client(what: str, *arguments: object, timeout_s: float = 600.0) -> dict[str, Any]:
    """Run one measurement of `benchmarks.gateway_client` and return what it found. Raises RuntimeError."""
    command = [sys.executable, "-m", "benchmarks.gateway_client", what, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _flags(flags: dict[str, object]) -> list[str]:
    return [text for name, value in flags.items() for text in ("--" + name.replace("_", "-"), str(value))]
