"""Hidden states between two blocks: of the calibration windows, the canary and the evaluated models.

They are all that passes from one block to the next. This module does not know how a block is quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from services.quantizer.canary import CanaryRecorder
from services.quantizer.evaluation import VARIANTS, Evaluation
from services.quantizer.quantize import QuantizedBlock, rounded_weights
from services.quantizer.source import Source, Weights


@dataclass(slots=True)
class Streams:
    """`calibration` [windows, length, hidden] is what the next block is searched on."""

    calibration: Tensor
    canary: CanaryRecorder
    evaluation: Evaluation | None

    @classmethod
    def begin(cls, source: Source, calibration: Tensor, evaluation: Tensor | None) -> Streams:
        """Embed token ids [windows, length] of both texts."""
        return cls(
            source.embed(calibration),
            CanaryRecorder(source, calibration),
            None if evaluation is None else Evaluation(source, evaluation),
        )

    def advance(
        self,
        source: Source,
        layer: nn.Module,
        weights: Weights,
        block: QuantizedBlock,
        *,
        group_size: int,
        propagate_error: bool,
        is_last: bool,
    ) -> None:
        """Through one block, whose source weights are `weights`. After the last nothing is calibrated."""
        if not is_last:
            seen = block.weights if propagate_error else weights
            self.calibration = source.run_block(layer, seen, self.calibration)
        self.canary.advance(layer, block.weights)
        if self.evaluation is not None:
            rounded = rounded_weights(weights, list(block.linears), group_size)
            for variant, seen in zip(VARIANTS, (weights, rounded, block.weights), strict=True):
                self.evaluation.advance(layer, variant, seen)
