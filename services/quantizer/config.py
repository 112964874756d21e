"""What one run of the quantizer was asked to do. Made from flags in __main__; nothing here reads files or
the environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.quantizer.errors import QuantizerError
from weft.artifact.manifest import is_model_name

GROUP_SIZES = (32, 64, 128)
RECIPE_VERSION = 1


@dataclass(frozen=True, slots=True)
class QuantizerConfig:
    """One run.

    Attributes:
        source: directory of the checkpoint.
        artifacts: root of the artifact volume.
        name: model name to publish under.
        calibration: UTF-8 text files; empty means the bundled ones.
        samples: calibration windows, at most.
        sequence_length: tokens per calibration window, the beginning-of-text token included.
        evaluation: held-out UTF-8 text files; empty means the bundled ones.
        evaluation_tokens: tokens to evaluate on, at most; 0 skips the evaluation.
        group_size: input channels that share a scale.
        skip_indivisible: leave sets that the group size does not divide in full precision, instead of
        refusing. propagate_error: each block is calibrated on what the quantized blocks before it put out.
        device: "cpu" or "cuda".
        threads: CPU threads; None leaves torch's choice.
        seed: chooses the calibration windows.
        force: quantize even when CURRENT already holds this.
    """

    source: Path
    artifacts: Path
    name: str
    calibration: tuple[Path, ...] = ()
    samples: int = 128
    sequence_length: int = 512
    evaluation: tuple[Path, ...] = ()
    evaluation_tokens: int = 32768
    group_size: int = 128
    skip_indivisible: bool = False
    propagate_error: bool = True
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        if not is_model_name(self.name):
            raise QuantizerError(f"--name {self.name[:80]!r}: must match [a-z0-9][a-z0-9._-]{{0,63}}")
        if self.group_size not in GROUP_SIZES:
            raise QuantizerError(f"--group-size {self.group_size}: must be one of 32, 64, 128")
        if not 0 <= self.seed < 1 << 64:
            raise QuantizerError(f"--seed {self.seed}: must be between 0 and 2^64 - 1")
        if self.device != "cpu" and not self.device.startswith("cuda"):
            raise QuantizerError(f"--device {self.device}: must be cpu or cuda")
        for flag, value, least, most in (
            ("--samples", self.samples, 1, 1 << 16),
            ("--sequence-length", self.sequence_length, 8, 1 << 17),
            ("--evaluation-tokens", self.evaluation_tokens, 0, 1 << 30),
            ("--threads", 1 if self.threads is None else self.threads, 1, 1 << 10),
        ):
            if not least <= value <= most:
                raise QuantizerError(f"{flag} {value}: must be between {least} and {most}")

    def recipe(self, evaluation_digest: str) -> dict[str, Any]:
        """Everything but source, seed and calibration text that decides what the artifact holds."""
        return {
            "version": RECIPE_VERSION,
            "method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": True,
            "clip": "asymmetric",
            "propagate_error": self.propagate_error,
            "skip_indivisible": self.skip_indivisible,
            "samples": self.samples,
            "sequence_length": self.sequence_length,
            "evaluation_tokens": self.evaluation_tokens,
            "evaluation_digest": evaluation_digest,
        }
