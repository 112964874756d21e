"""An engine in a process of its own, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
ORACLE = str(Path(__file__).with_name("oracle_engine.py"))


class EngineProcess:
    """An engine process and its log lines."""

    def __init__(self, *flags: object, mood: str | None = None) -> None:
        command = [ORACLE] if mood else ["-m", "services.engine"]
        source = ["--artifacts", "unused", "--model", mood] if mood else []
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WEFT_")}
        self.popen = subprocess.Popen(
            [sys.executable, *command, "serve", "--listen", "127.0.0.1:0", *source, *map(str, flags)],
            stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.lines: list[str] = []
        self.events: list[dict[str, Any]] = []

    def _take(self, line: str) -> None:
        self.lines.append(line)
        if line.startswith("{"):
            self.events.append(json.loads(line))

    def wait_for(self, event: str) -> dict[str, Any]:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self._take(line)
            if self.events and self.events[-1]["event"] == event:
                return self.events[-1]
        raise AssertionError(f"no event {event!r}: {self.lines}")

    def serving(self) -> str:
        return str(self.wait_for("serving")["address"])

    def end(self, within_s: float = 20) -> int:
        assert self.popen.stderr is not None
        code = self.popen.wait(within_s)
        for line in self.popen.stderr:
            self._take(line)
        return code

    def event(self, name: str) -> dict[str, Any]:
        found = [event for event in self.events if event["event"] == name]
        assert len(found) == 1, self.lines
        return found[0]
