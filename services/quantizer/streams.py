"""Hidden states between two blocks: of the calibration windows, the canary and the evaluated models.

They are all that passes from one block to the next, and so all that a run needs to go on from there. This
module does not know how a block is quantized, nor where states are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from services.quantizer.canary import CanaryRecorder
from services.quantizer.errors import QuantizerError
from services.quantizer.evaluation import VARIANTS, Evaluation
from services.quantizer.grid import round_to_nearest
from services.quantizer.source import Source, Weights

_CALIBRATION = "calibration"
_EXACT = "exact"
_CANARY = "canary"
_EVALUATION = "evaluation."


@dataclass(slots=True)
class Streams:
    """`calibration` [windows, length, hidden] is what the next block is searched on; `exact`, if kept, what
    the source's own blocks make of the same text.
    """

    calibration: Tensor
    canary: CanaryRecorder
    evaluation: Evaluation | None
    exact: Tensor | None = None

    @classmethod
    def begin(
        cls, source: Source, calibration: Tensor, evaluation: Tensor | None, *, has_exact: bool = False
    ) -> Streams:
        """Embed token ids [windows, length] of both texts."""
        return cls(
            source.embed(calibration),
            CanaryRecorder(source, calibration),
            None if evaluation is None else Evaluation(source, evaluation),
            source.embed(calibration) if has_exact else None,
        )

    @classmethod
    def restore(
        cls,
        source: Source,
        calibration: Tensor,
        evaluation: Tensor | None,
        tensors: Mapping[str, Tensor],
        *,
        has_exact: bool = False,
    ) -> Streams:
        """As they were when `tensors` gave these; the token ids are those of `begin`."""
        expected = {
            _CALIBRATION: calibration.shape,
            **({_EXACT: calibration.shape} if has_exact else {}),
            **({} if evaluation is None else {_EVALUATION + name: evaluation.shape for name in VARIANTS}),
        }
        for name, shape in expected.items():
            if name not in tensors or tensors[name].shape != (*shape, source.hidden_size):
                raise QuantizerError(
                    f"the kept stream {name} is not of this text; start over with --no-resume"
                )
        hidden = {name: tensors[_EVALUATION + name] for name in VARIANTS} if evaluation is not None else {}
        return cls(
            tensors[_CALIBRATION],
            CanaryRecorder(source, calibration, tensors[_CANARY]),
            None if evaluation is None else Evaluation(source, evaluation, hidden),
            tensors[_EXACT] if has_exact else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything as it is now, by name; not copies."""
        evaluation = {} if self.evaluation is None else self.evaluation.hidden
        return {
            _CALIBRATION: self.calibration,
            **({} if self.exact is None else {_EXACT: self.exact}),
            _CANARY: self.canary.hidden,
            **{_EVALUATION + name: tensor for name, tensor in evaluation.items()},
        }

    def advance(
        self,
        source: Source,
        layer: nn.Module,
        weights: Weights,
        quantized: Weights,
        linears: Collection[str],
        *,
        group_size: int,
        behind: Tensor | None,
        has_left: bool = False,
        is_last: bool,
    ) -> None:
        """Through one block, in place; `behind`, if given, is the calibration stream behind it; with
        `has_left` it is there already, and so is the exact one. `weights` are the source's and are used up:
        where `linears` were, plain rounding is in the end. `quantized` are the artifact's. After the last
        block nothing is calibrated.
        """
        if behind is not None:
            self.calibration = behind
        elif not is_last and not has_left:
            source.run_block(layer, quantized, self.calibration, in_place=True)
        self.canary.advance(layer, quantized)
        if self.evaluation is None:
            return
        self.evaluation.advance(layer, "source", weights)
        self.evaluation.advance(layer, "chosen", quantized)
        for name in linears:  # in place of the source's, so that no third set of weights is in memory
            key = f"{name}.weight"
            weights[key] = round_to_nearest(weights[key], group_size).dequantize()
        self.evaluation.advance(layer, "rounding", weights)
