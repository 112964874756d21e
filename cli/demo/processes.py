"""Services as child processes: start, wait until one says that it serves, stop, show the end of its log.

A service is told to take any free port and logs one JSON object per line; the address it got is in its own
`serving` event, so no port is guessed and none can be taken by another in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What the services' packages are imported from: a checkout, or where pip has put them. Children run in it, so
# that a file of the user's folder cannot stand in for a module; paths that they are given must be whole.
ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.05
STOP_TIMEOUT_S = 60.0
TAIL_LINES = 15


class ServiceError(Exception):
    """A service ended, or did not get ready. The message holds the last lines of its log."""


class Service:
    """One child process and its log file, in a process group of its own: Ctrl-C here does not reach it."""

    def __init__(self, name: str, command: list[str], log_directory: Path) -> None:
        self.name = name
        self.log_path = log_directory / f"{name}.log"
        log_directory.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Its exit code once it has ended; a signal's number is negative."""
        return self._process.poll()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_any_left(self) -> bool:
        """Whether it, or a process that it started in its group, lives."""
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it lives."""
        if self.is_running:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, also when it is stopped, and wait. May come twice."""
        if self.is_running:
            self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)

    def events(self) -> Iterator[dict[str, Any]]:
        """What it has logged so far; lines that are no JSON objects (a traceback) are left out."""
        for line in self.log_path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event

    def wait_for(self, event_name: str, timeout_s: float) -> dict[str, Any]:
        """The first event of this name. Raises ServiceError when the process ends or the time is over."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            was_running = self.is_running
            for event in self.events():
                if event.get("event") == event_name:
                    return event
            if not was_running:
                raise ServiceError(f"{self.name} exited with {self._process.returncode}\n{self.tail()}")
            if time.monotonic() > give_up_at:
                raise ServiceError(f"{self.name}: no '{event_name}' within {timeout_s:.0f} s\n{self.tail()}")
            time.sleep(POLL_S)

    def tail(self) -> str:
        """The last lines of the log, indented."""
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"last lines of {self.log_path}:", *(f"  {line}" for line in lines)])

    def stop(self) -> None:
        """SIGTERM and wait. Raises ServiceError when it does not end by itself, or not with 0."""
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise ServiceError(f"{self.name} did not stop in {STOP_TIMEOUT_S:.0f} s\n{self.tail()}") from None
        if code != 0:
            raise ServiceError(f"{self.name} exited with {code}\n{self.tail()}")


def command_of(name: str, arguments: list[str]) -> list[str]:
    """The command line of a service of this installation, with this interpreter."""
    return [sys.executable, "-m", f"services.{name}", *arguments]


def run(name: str, arguments: list[str]) -> None:
    """Run a service's batch command to its end, on this terminal. Raises ServiceError."""
    code = subprocess.run(command_of(name, arguments), cwd=ROOT).returncode
    if code != 0:
        raise ServiceError(f"{name} exited with {code}")


class Stack:
    """Services in the order of their start. They stop in the reverse order, whatever the others do."""

    def __init__(self) -> None:
        self._services: list[Service] = []

    def start(self, name: str, command: list[str], log_directory: Path) -> Service:
        """Start a process; `stop` will stop it."""
        service = Service(name, command, log_directory)
        self._services.append(service)
        return service

    def kill(self, service: Service) -> None:
        """SIGKILL to one of them; it is the stack's no more."""
        self._services.remove(service)
        service.kill()

    def tails(self) -> str:
        """The last log lines of every service."""
        return "\n".join(service.tail() for service in self._services)

    @property
    def dead(self) -> list[Service]:
        """Those that have ended."""
        return [service for service in self._services if not service.is_running]

    def stop(self) -> list[str]:
        """Stop all, last started first, and return what went wrong."""
        problems: list[str] = []
        while self._services:
            try:
                self._services.pop().stop()
            except ServiceError as error:
                problems.append(str(error))
        return problems
