"""What a run reads besides the weights: windows of token ids for calibration and evaluation, and where they
came from. Knows neither how a block is quantized nor what the numbers mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from services.quantizer.calibration import calibration_windows, evaluation_windows, load_tokenizer
from services.quantizer.config import QuantizerConfig
from services.quantizer.errors import QuantizerError
from services.quantizer.source import Source
from services.quantizer.texts import BUNDLED_CALIBRATION, BUNDLED_EVALUATION, read_texts
from weft import logs

_LOGGER = logs.get_logger("quantizer")
_MAX_EVALUATION_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class Inputs:
    """Token ids int64 [windows, length].

    Attributes:
        calibration: what the search sees.
        evaluation: held-out text, or None when nothing is evaluated.
        description: JSON-able, for the report: which files gave how much.
    """

    calibration: Tensor
    evaluation: Tensor | None
    description: dict[str, Any] = field(default_factory=dict)


def read_inputs(config: QuantizerConfig, source: Source) -> Inputs:
    """All text of a run as token ids. Raises QuantizerError."""
    if config.sequence_length > source.max_length:
        raise QuantizerError(
            f"--sequence-length {config.sequence_length}: the model's context is {source.max_length}"
        )
    tokenizer = load_tokenizer(config.source)
    calibration_texts, _ = read_texts(config.calibration or BUNDLED_CALIBRATION)
    evaluation_texts, _ = read_texts(config.evaluation or BUNDLED_EVALUATION)
    calibration = calibration_windows(
        tokenizer, calibration_texts, config.samples, config.sequence_length, config.seed, source.vocab_size
    )
    if len(calibration) < config.samples:
        _LOGGER.warning("short calibration text", windows=len(calibration), asked=config.samples)
    evaluation = None
    if config.evaluation_tokens:
        length = min(_MAX_EVALUATION_LENGTH, source.max_length)
        evaluation = evaluation_windows(
            tokenizer, evaluation_texts, config.evaluation_tokens, length, source.vocab_size
        )
    return Inputs(calibration, evaluation)
