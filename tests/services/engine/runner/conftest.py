"""The demo model in AutoAWQ's layout, and runners of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.engine.runner.config import RunnerConfig
from services.engine.runner.model_runner import ModelRunner, load_runner
from tests.services.engine.kernels.gpu.conftest import device  # noqa: F401  # with it, the interpreter
from tests.services.engine.models.checkpoints import quantize_checkpoint


@pytest.fixture(scope="session")
def packed_demo(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, its decoder linears rounded to 4 bits in groups of 128."""
    return quantize_checkpoint(demo_model, tmp_path_factory.mktemp("packed") / "demo", 128)


@pytest.fixture(scope="session")
def runners(packed_demo: Path) -> dict[int, ModelRunner]:
    """Deterministic fp32 runners by block size; their cache memory is NaN where nothing was written."""
    return {
        size: load_runner(
            RunnerConfig(
                source=packed_demo,
                dtype="float32",
                is_deterministic=True,
                block_size=size,
                num_blocks=24 * 1024 // size,
                is_poisoned=True,
            )
        )
        for size in (16, 128)
    }
