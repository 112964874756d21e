"""A signal that comes while a service still imports ends it as any later one would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("service", ["engine", "gateway"])
def test_a_signal_during_the_imports_exits_zero(
    root: Path, tmp_path: Path, service: str, number: int
) -> None:
    (tmp_path / "grpc.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), str(root)])
    process = subprocess.Popen(
        [sys.executable, "-m", f"services.{service}", "serve"],
        cwd=root, env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0
        assert errors == ""
    finally:
        process.kill()
        process.wait()
