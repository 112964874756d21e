"""What one run of the quantizer was asked to do: flags, variables, defaults. Reads no files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.artifact.manifest import is_model_name
from weft.config import REQUIRED, ConfigError, option, parse_float, parse_size

GROUP_SIZES = ("32", "64", "128")
RECIPE_VERSION = 1
PATH_SEPARATOR = ":"
ENV_PREFIX = "WEFT_QUANTIZER_"
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")


def _paths(text: str) -> tuple[Path, ...]:
    paths = tuple(Path(part) for part in text.split(PATH_SEPARATOR) if part)
    if not paths:
        raise ValueError("no file is named")
    return paths


def _increase(text: str) -> float:
    """ "1%" or "0.01". A bare 1 would be taken for either, so it is refused."""
    number = text.strip()
    if number.endswith("%"):
        return parse_float(number[:-1]) / 100
    value = parse_float(number)
    if value >= 1:
        raise ValueError(f"{text!r}: write {text}% or a fraction below 1")
    return value


@dataclass(frozen=True, slots=True)
class QuantizerConfig:
    """One run. Empty `calibration` and `evaluation` mean the bundled texts."""

    source: Path = option(REQUIRED, "Hugging Face checkpoint directory (safetensors)", metavar="DIR")  # noqa: RUF009
    artifacts: Path = option(REQUIRED, "root of the artifact volume", metavar="DIR")  # noqa: RUF009
    name: str = option(REQUIRED, "model name to publish under")
    calibration: tuple[Path, ...] = option((), "UTF-8 text files", parse=_paths, metavar="FILE ...")
    samples: int = option(128, "calibration windows, at most", metavar="N")
    sequence_length: int = option(512, "tokens of a calibration window", metavar="N")
    evaluation: tuple[Path, ...] = option((), "held-out UTF-8 text files", parse=_paths, metavar="FILE ...")
    evaluation_tokens: int = option(32768, "tokens to evaluate on, at most; 0 skips it", metavar="N")
    max_perplexity_increase: float | None = option(
        None, "publish nothing whose perplexity is further above the source's", parse=_increase, metavar="1%"
    )
    max_kl: float | None = option(
        None, "publish nothing whose mean KL to the source is larger", metavar="NATS"
    )
    group_size: int = option(128, "input channels that share a scale", choices=GROUP_SIZES)
    skip_indivisible: bool = option(False, "leave sets that do not divide in full precision")
    propagate_error: bool = option(True, "calibrate each block on the quantized ones before it")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    threads: int | None = option(None, "CPU threads; by default torch decides", metavar="N")
    seed: int = option(0, "chooses the calibration windows", metavar="N")
    force: bool = option(False, "quantize even when CURRENT already holds this")
    resume: bool = option(True, "go on from the last finished block of a run that was ended")
    memory_limit: int | None = option(
        None, "refuse a job that needs more; by default what is available", parse=parse_size, metavar="8GiB"
    )

    def __post_init__(self) -> None:
        if not is_model_name(self.name):
            raise ConfigError("--name", f"{self.name[:80]!r} does not match [a-z0-9][a-z0-9._-]{{0,63}}")
        if str(self.group_size) not in GROUP_SIZES:
            raise ConfigError("--group-size", f"{self.group_size} is none of {', '.join(GROUP_SIZES)}")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError("--seed", f"{self.seed} is not between 0 and 2^64 - 1")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError("--device", f"{self.device[:80]!r} is neither cpu, cuda nor cuda:N")
        for flag, value, least, most in (
            ("--samples", self.samples, 1, 1 << 16),
            ("--sequence-length", self.sequence_length, 8, 1 << 17),
            ("--evaluation-tokens", self.evaluation_tokens, 0, 1 << 30),
            ("--threads", 1 if self.threads is None else self.threads, 1, 1 << 10),
            ("--memory-limit", 1 if self.memory_limit is None else self.memory_limit, 1, 1 << 50),
        ):
            if not least <= value <= most:
                raise ConfigError(flag, f"{value} is not between {least} and {most}")

        self._check_gate()

    def _check_gate(self) -> None:
        for flag, bound in (
            ("--max-perplexity-increase", self.max_perplexity_increase),
            ("--max-kl", self.max_kl),
        ):
            if bound is None:
                continue
            if not bound >= 0:
                raise ConfigError(flag, f"{bound} is negative")
            if not self.evaluation_tokens:
                raise ConfigError(flag, "there is nothing to judge by with --evaluation-tokens 0")

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
