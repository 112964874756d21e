"""What a run's log lines tell: how far it is, how long the rest takes, and in one line why it failed."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from typing import Any

from weft.artifact.manifest import is_model_name

KEPT_LINES = 100
KEPT_LINE_CHARS = 2000
MESSAGE_CHARS = 500
_MAX_STEPS = 1 << 20


@dataclass(frozen=True, slots=True)
class Report:
    """How far a run is. `eta_s` is None until there is a pace."""

    message: str
    done: int
    total: int
    eta_s: float | None
    is_publishing: bool = False


class ProgressLog:
    """Takes the lines of one run as they come. Times are those of a clock that no one sets."""

    def __init__(self, now: float) -> None:
        self.tail: deque[str] = deque(maxlen=KEPT_LINES)
        self.version = ""
        self.success = "published"
        self._last_words = ""
        self._report = Report("starting", 0, 0, None)
        # Where the pace is measured from: blocks that an earlier run finished took this one no time.
        self._base_time, self._base_done = now, 0

    @property
    def report(self) -> Report:
        """The last report."""
        return self._report

    @property
    def last_words(self) -> str:
        """What the run said when it ended: its last line that is no event."""
        return self._last_words

    def take(self, line: str, now: float) -> Report | None:
        """The report when the line changes it, else None."""
        self.tail.append(line[:KEPT_LINE_CHARS])
        event = _event(line)
        if event is None:
            if line.strip():
                self._last_words = line.strip().removeprefix("error: ")[:MESSAGE_CHARS]
            return None
        before = self._report
        self._apply(event, now)
        return None if self._report == before else self._report

    def _apply(self, event: dict[str, Any], now: float) -> None:
        kind, report = event.get("event"), self._report
        if kind == "plan":
            self._base_time, self._base_done = now, _count(event.get("resumed_blocks"))
            total = max(report.total, _count(event.get("blocks")))
            resumed = self._base_done
            what = f"goes on after block {resumed}" if resumed else "reading the source"
            self._report = Report(what, resumed, total, None)
        elif kind == "progress":
            done, total = _count(event.get("done")), _count(event.get("total"))
            eta = None
            if done > self._base_done:
                eta = max(total - done, 0) * (now - self._base_time) / (done - self._base_done)
            what = str(event.get("what", ""))[:MESSAGE_CHARS]
            self._report = Report(what, min(done, total), total, eta, report.is_publishing)
        elif kind == "publishing":
            self._report = Report("publishing", report.done, report.total, None, is_publishing=True)
        elif kind in ("published", "up to date"):
            version = event.get("version")
            if isinstance(version, str) and is_model_name(version):
                self.version, self.success = version, str(kind)


def _event(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        document = json.loads(line)
    except ValueError:
        return None
    return document if isinstance(document, dict) and isinstance(document.get("event"), str) else None


def _count(value: Any) -> int:
    return min(max(value, 0), _MAX_STEPS) if isinstance(value, int) and not isinstance(value, bool) else 0
