"""Services let waiting threads sleep before torch is there to read the variable."""

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
print(os.environ["OMP_WAIT_POLICY"])
"""


@pytest.mark.parametrize("module", ["services.engine.serve", "services.quantizer.__main__"])
@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_torch_is_imported_after_the_policy_is_set(root, module, given, expected):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    code = CODE.format(module=module)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expected]
