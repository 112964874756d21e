"""Fixtures that every test may use. Ask for one by name; nothing here starts a service or imports torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported anywhere: more threads than the few cores of a test machine only slow it down.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Waiting threads that spin take the cores from the processes they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def demo_model(root: Path) -> Path:
    """The committed demo checkpoint, a Hugging Face directory."""
    return root / "models" / "demo"
