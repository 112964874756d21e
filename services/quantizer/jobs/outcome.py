"""What the end of a run means for its job: one table, from exit status to state."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from services.quantizer.jobs.job import State
from services.quantizer.jobs.runner import Ended
from weft.artifact.manifest import is_model_name

MAX_CRASHES = 3
BUSY_DELAY_S = 2.0
CRASH_DELAY_S = 5.0
MAX_DELAY_S = 60.0
_PUBLISHED, _GATE_MISSED, _BUSY, _BY_SIGNAL = 0, 3, 4, 128


@dataclass(frozen=True, slots=True)
class Verdict:
    """`state` None means back into the queue, to be tried after `delay_s`."""

    state: State | None
    message: str
    version: str = ""
    delay_s: float = 0.0
    is_crash: bool = False


def judge(
    ended: Ended,
    words: str,
    version: str,
    success: str = "published",
    *,
    crashes: int,
    attempt: int,
    is_cancelled: bool,
    is_stopping: bool,
) -> Verdict:
    """What becomes of a job whose run ended so. `words` is the run's last line, `version` what it published
    or found to be up to date, as `success` says, `crashes` how often it had crashed before.

    A run that had published before it was stopped has succeeded, whoever asked for the stop.
    """
    if ended.code == _PUBLISHED:
        found = version or Path(ended.first_line.strip()).name
        return Verdict(State.SUCCEEDED, success, found if is_model_name(found) else "")
    if is_cancelled:
        return Verdict(State.CANCELLED, "cancelled")
    if is_stopping:
        return Verdict(None, "the service stopped; it goes on from the last finished block")
    if ended.code == _BUSY:
        delay = min(BUSY_DELAY_S * 2 ** min(attempt - 1, 16), MAX_DELAY_S)
        return Verdict(None, words or "another run of this name is at work", delay_s=delay)
    if ended.code >= _BY_SIGNAL:
        what = words or _how_it_died(ended.code)
        if crashes + 1 >= MAX_CRASHES:
            return Verdict(State.FAILED, f"given up after {MAX_CRASHES} crashes: {what}")
        delay = min(CRASH_DELAY_S * 2**crashes, MAX_DELAY_S)
        return Verdict(None, f"crashed, to be tried again: {what}", delay_s=delay, is_crash=True)
    if ended.code == _GATE_MISSED:
        return Verdict(State.FAILED, words or "the quality gate was missed")
    return Verdict(State.FAILED, words or f"the run ended with status {ended.code}")


def _how_it_died(code: int) -> str:
    try:
        name = signal.Signals(code - _BY_SIGNAL).name
    except ValueError:
        return f"the run ended with status {code}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"the run was ended by {name}{hint}"
