"""Progress: log lines where nobody looks, a bar on a terminal."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SCRIPT = """
from services.quantizer.progress import ProgressReporter
from weft import logs
logs.start()
with ProgressReporter(4) as progress:
    progress.plan("4 steps [ahead]", blocks=3, resumed_blocks=1, memory=5, available=None)
    progress.advance("block 2")
    progress.advance("block 3")
    progress.publishing()
    progress.published("awq-1")
logs.stop()
"""


def test_log_lines_elsewhere():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stderr.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == [
        "plan", "progress", "progress", "publishing", "published",
    ]  # fmt: skip
    plan = {key: events[0][key] for key in ("blocks", "resumed_blocks", "memory_bytes")}
    assert plan == {"blocks": 3, "resumed_blocks": 1, "memory_bytes": 5}
    assert events[0]["memory_available_bytes"] is None
    assert [(event["done"], event["total"]) for event in events[1:3]] == [(2, 4), (3, 4)]
    assert events[2]["what"] == "block 3"
    assert 0 <= events[2]["seconds"] < 5
    assert events[4]["version"] == "awq-1"


def test_a_bar_on_a_terminal():
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=30) == 0
    assert b"4 steps [ahead]" in shown
    assert b"3/4" in shown
    assert b"progress" not in shown
