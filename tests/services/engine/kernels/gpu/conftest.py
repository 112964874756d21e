"""Kernel tests run on the GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter must be chosen before the first kernel is decorated, hence here and not in a fixture.
"""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")


@pytest.fixture(scope="session")
def device():
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison_empty():
    """What `torch.empty` gives holds NaN (integers their largest value), so that a slot left out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
