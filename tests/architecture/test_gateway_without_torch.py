"""The gateway imports, and starts, where torch and its friends cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Runs in a child: the finder refuses the names before any other finder is asked.
BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "triton", "safetensors", "transformers"}:
            raise ImportError(f"{name} is blocked")
        return None

sys.meta_path.insert(0, Refuse())
"""

IMPORT_ALL = """
import importlib, pkgutil
import services.gateway
names = [m.name for m in pkgutil.walk_packages(services.gateway.__path__, "services.gateway.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""


def run_blocked(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code, *args], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_the_block_blocks() -> None:
    result = run_blocked("import torch")
    assert result.returncode != 0
    assert "torch is blocked" in result.stderr


def test_every_gateway_module_imports() -> None:
    result = run_blocked(IMPORT_ALL)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 5
