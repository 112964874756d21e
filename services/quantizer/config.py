"""What one run of the quantizer was asked to do: flags, variables, defaults. Reads no files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.artifact.manifest import is_model_name
from weft.config import REQUIRED, ConfigError, option, parse_float, parse_size

GROUP_SIZES = ("32", "64", "128")
AWQ, COMPRESSED_TENSORS = "awq", "compressed-tensors"
FORMATS = (AWQ, COMPRESSED_TENSORS)
BEST = "best"
METHODS = ("awq", "awq+", "gptq", BEST)
RECIPE_VERSION = 2
PATH_SEPARATOR = ":"
DEFAULT_SAMPLES = 128
ENV_PREFIX = "WEFT_QUANTIZER_"
_WEIGHTED = re.compile(r"(?s)(.+)@(\d{1,9}(?:\.\d{1,9})?)\Z")
_WORKERS = re.compile(
    r"local:[1-9]\d{0,2}|ray:auto|ray:(//)?(\[[0-9A-Fa-f:.]+\]|[\w.-]{1,253}):\d{1,5}", re.ASCII
)
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")


def _paths(text: str) -> tuple[Path, ...]:
    paths = tuple(Path(part) for part in text.split(PATH_SEPARATOR) if part)
    if not paths:
        raise ValueError("no file is named")
    return paths


def split_weight(path: Path) -> tuple[Path, float | None]:
    """`chat.jsonl@2.5` as its name and its weight; None without one. The last @ counts, so a file whose own
    name ends like that is given with a weight behind it. Raises ValueError for a weight of zero.
    """
    match = _WEIGHTED.match(str(path))
    if match is None:
        return path, None
    if not float(match[2]) > 0:
        raise ValueError(f"{str(path)!r}: a weight of zero leaves nothing of the file")
    return Path(match[1]), float(match[2])


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
    """One run. Empty `calibration` and `evaluation` mean the bundled texts. `samples` is a number once the
    object is made: what was given, or what `calibration_tokens` makes of it.
    """

    source: Path = option(  # noqa: RUF009
        REQUIRED, "Hugging Face checkpoint directory (safetensors), or hub id", metavar="DIR|ORG/NAME"
    )
    revision: str | None = option(None, "commit or tag of the hub id", metavar="REV")
    hub_cache: Path | None = option(  # noqa: RUF009
        None, "where hub models are kept; by default the hub client's own", metavar="DIR"
    )
    artifacts: Path = option(REQUIRED, "root of the artifact volume", metavar="DIR")  # noqa: RUF009
    name: str = option(REQUIRED, "model name to publish under")
    calibration: tuple[Path, ...] = option(
        (), "UTF-8 text or JSON lines, with shares", parse=_paths, metavar="FILE[@WEIGHT] ..."
    )
    samples: int = option(None, f"calibration windows, at most; {DEFAULT_SAMPLES} by default", metavar="N")
    calibration_tokens: int | None = option(
        None, "calibration tokens, at most: --samples by another name", metavar="N"
    )
    sequence_length: int = option(512, "tokens of a calibration window", metavar="N")
    evaluation: tuple[Path, ...] = option((), "held-out UTF-8 text files", parse=_paths, metavar="FILE ...")
    evaluation_tokens: int = option(32768, "tokens to evaluate on, at most; 0 skips it", metavar="N")
    max_perplexity_increase: float | None = option(
        None, "publish nothing whose perplexity is further above the source's", parse=_increase, metavar="1%"
    )
    max_kl: float | None = option(
        None, "publish nothing whose mean KL to the source is larger", metavar="NATS"
    )
    method: str = option(BEST, "how weights are chosen", choices=METHODS)
    group_size: int = option(128, "input channels that share a scale", choices=GROUP_SIZES)
    format: str = option(AWQ, "how the artifact stores its weights", choices=FORMATS)
    skip_indivisible: bool = option(False, "leave sets that do not divide in full precision")
    propagate_error: bool = option(True, "calibrate each block on the quantized ones before it")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    workers: str | None = option(
        None, "where to search: local:N, ray:auto, ray:HOST:PORT, ray://HOST:PORT", metavar="WHERE"
    )
    threads: int | None = option(None, "CPU threads; by default torch decides", metavar="N")
    seed: int = option(0, "chooses the calibration windows", metavar="N")
    force: bool = option(False, "quantize even when CURRENT already holds this")
    resume: bool = option(True, "go on from the last finished block of a run that was ended")
    memory_limit: int | None = option(
        None, "refuse a job that needs more; by default what is available", parse=parse_size, metavar="8GiB"
    )
    fencing_token: int | None = option(
        None, "a larger one that has been here keeps this run from publishing", metavar="N"
    )

    def __post_init__(self) -> None:
        if not is_model_name(self.name):
            raise ConfigError("--name", f"{self.name[:80]!r} does not match [a-z0-9][a-z0-9._-]{{0,63}}")
        if str(self.group_size) not in GROUP_SIZES:
            raise ConfigError("--group-size", f"{self.group_size} is none of {', '.join(GROUP_SIZES)}")
        if self.method not in METHODS:
            raise ConfigError("--method", f"{self.method[:80]!r} is none of {', '.join(METHODS)}")
        if self.format not in FORMATS:
            raise ConfigError("--format", f"{self.format[:80]!r} is none of {', '.join(FORMATS)}")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError("--seed", f"{self.seed} is not between 0 and 2^64 - 1")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError("--device", f"{self.device[:80]!r} is neither cpu, cuda nor cuda:N")
        if self.workers is not None and not _WORKERS.fullmatch(self.workers):
            raise ConfigError(
                "--workers",
                f"{self.workers[:80]!r} is none of local:N, ray:auto, ray:HOST:PORT, ray://HOST:PORT",
            )
        for flag, value, least, most in (
            ("--samples", DEFAULT_SAMPLES if self.samples is None else self.samples, 1, 1 << 16),
            ("--sequence-length", self.sequence_length, 1, 1 << 17),
            ("--evaluation-tokens", self.evaluation_tokens, 0, 1 << 30),
            ("--threads", 1 if self.threads is None else self.threads, 1, 1 << 10),
            ("--fencing-token", self.fencing_token or 0, 0, (1 << 62) - 1),
            ("--memory-limit", 1 if self.memory_limit is None else self.memory_limit, 1, 1 << 50),
        ):
            if not least <= value <= most:
                raise ConfigError(flag, f"{value} is not between {least} and {most}")

        self._check_gate()
        self._resolve_samples()
        try:
            for path in self.calibration:
                split_weight(path)
        except ValueError as error:
            raise ConfigError("--calibration", str(error)) from None

    def _resolve_samples(self) -> None:
        """One number of windows, however it was said."""
        if self.calibration_tokens is None:
            windows = DEFAULT_SAMPLES if self.samples is None else self.samples
        else:
            windows = self.calibration_tokens // self.sequence_length
            budget = f"{self.calibration_tokens} tokens are {windows} windows of {self.sequence_length}"
            if not 1 <= windows <= 1 << 16:
                raise ConfigError("--calibration-tokens", f"{budget}, which is not between 1 and {1 << 16}")
            if self.samples not in (None, windows):
                raise ConfigError("--calibration-tokens", f"{budget}, --samples says {self.samples}")
        object.__setattr__(self, "samples", windows)

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

    @property
    def has_exact_stream(self) -> bool:
        """Whether the source's own hidden states go along with the calibration stream: what the quantized
        blocks lose can then be made up for.
        """
        return self.method == BEST and self.propagate_error

    def recipe(self, evaluation_digest: str) -> dict[str, Any]:
        """Everything but source, seed and calibration text that decides what the artifact holds."""
        return {
            "version": RECIPE_VERSION,
            "method": self.method,
            "bits": 4,
            "group_size": self.group_size,
            "format": self.format,
            "zero_point": True,
            "propagate_error": self.propagate_error,
            "skip_indivisible": self.skip_indivisible,
            "samples": self.samples,
            "calibration_weights": [split_weight(path)[1] for path in self.calibration],
            "sequence_length": self.sequence_length,
            "evaluation_tokens": self.evaluation_tokens,
            "evaluation_digest": evaluation_digest,
        }
