"""Progress: log lines where nobody looks, a bar on a terminal."""

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
with ProgressReporter(2) as progress:
    progress.advance("block 1")
    progress.advance("block 2")
logs.stop()
"""


def test_log_lines_elsewhere():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert '"done": 2, "total": 2, "what": "block 2"' in lines[1]


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
    assert b"2/2" in shown
    assert b"progress" not in shown
