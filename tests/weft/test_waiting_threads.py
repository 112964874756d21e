"""Services let waiting threads sleep before torch is there to read the variables."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import sys
import {module}
from weft.config import let_waiting_threads_sleep
assert "torch" not in sys.modules, "torch came first"
let_waiting_threads_sleep()
import os
print(os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize("module", ["services.engine.serve", "services.quantizer.__main__"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["passive", "2000"]),
        ({"OMP_WAIT_POLICY": "active"}, ["active", "None"]),
        ({"OMP_WAIT_POLICY": "passive"}, ["passive", "None"]),
        ({"GOMP_SPINCOUNT": "7"}, ["passive", "7"]),
    ],
)
def test_torch_is_imported_after_the_policy_is_set(root, module, given, expected):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    code = CODE.format(module=module)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected


LOADED = """
from weft.config import let_waiting_threads_sleep
let_waiting_threads_sleep()
import torch
"""


def test_torchs_openmp_reads_what_was_set(root):
    """GNU's, which torch brings on Linux, says what it understood."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        cwd=root,
        env=environment | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "GOMP_" not in done.stderr:
        pytest.skip("another OpenMP")
    assert "GOMP_SPINCOUNT = '2000'" in done.stderr
