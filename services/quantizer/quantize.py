"""One decoder block from full precision to 4 bits: statistics, scale search, clip search, guard, folding.

The block's linears see the calibration inputs that the (already quantized) blocks before it give, with the
block itself in full precision. Errors are exact over all calibration tokens through Gram matrices; between
the best few candidates of a group the output of the module around it decides, on a part of the tokens. This
module does not know files, nor evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from services.quantizer.clipping import search_ranges
from services.quantizer.errors import QuantizerError
from services.quantizer.folding import Folding, fold
from services.quantizer.grid import QuantizedWeight, quantize, round_to_nearest
from services.quantizer.model_map import ScaleGroup
from services.quantizer.scales import Candidate, ScaleSpace, rank_candidates, weight_means
from services.quantizer.source import STORED_DTYPES, Source, Weights
from services.quantizer.statistics import capture_calls, collect_statistics, output_energy
from weft.artifact.manifest import LinearError

_NUM_FINALISTS = 3
_NUM_INSPECTED_WINDOWS = 8
_FINAL_SWEEPS = 2


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """What came of a block.

    Attributes:
        weights: all parameters as the artifact means them, folded and dequantized, fp32.
        linears: the integers of every quantized linear.
        errors: of every quantized linear, over the calibration inputs.
        choices: per scale group, the candidate taken.
    """

    weights: Weights
    linears: dict[str, QuantizedWeight]
    errors: dict[str, LinearError]
    choices: dict[str, str]


def indivisible_linears(source: Source, group_size: int) -> set[str]:
    """Linears (relative names) that cannot be packed, with all that share their input."""
    shapes = {name: tuple(p.shape) for name, p in source.block(0).named_parameters()}
    found: set[str] = set()
    for group in source.architecture.groups:
        for linear in group.linears:
            num_out, num_in = shapes[linear + ".weight"]
            if num_in % group_size or num_out % 8:
                found.update(group.linears)
    return found


def rounded_weights(weights: Weights, linears: Sequence[str], group_size: int) -> Weights:
    """The block under plain rounding: what the search is compared with."""
    rounded = {
        f"{name}.weight": round_to_nearest(weights[f"{name}.weight"], group_size).dequantize()
        for name in linears
    }
    return {**weights, **rounded}


class BlockQuantizer:
    """Quantizes one block; make a new one for each."""

    def __init__(
        self, source: Source, index: int, weights: Weights, hidden: Tensor, group_size: int, skipped: set[str]
    ) -> None:
        self._source, self._index, self._weights, self._group_size = source, index, weights, group_size
        self._layer = source.block(index)
        self._groups = [g for g in source.architecture.groups if not skipped.intersection(g.linears)]
        self._linears = [name for group in self._groups for name in group.linears]
        self._statistics = collect_statistics(source, self._layer, weights, hidden, self._groups)
        stride = max(1, hidden.shape[0] // _NUM_INSPECTED_WINDOWS)
        self._calls = capture_calls(source, self._layer, weights, hidden[::stride], self._groups)
        self._references: dict[str, list[Tensor]] = {}
        self._energy: dict[str, float] = {}
        self._rounding: dict[str, float] = {}
        for group in self._groups:
            gram = self._statistics[group.linears[0]].gram
            for name in group.linears:
                weight = weights[f"{name}.weight"]
                energy = output_energy(weight, gram)
                if not math.isfinite(energy):
                    full_name = source.full_name(index, name)
                    raise QuantizerError(f"tensor {full_name}.weight: its outputs on the text are not finite")
                self._energy[name] = max(energy, torch.finfo(torch.float32).tiny)
                rounded = round_to_nearest(weight, group_size).dequantize()
                self._rounding[name] = output_energy(rounded - weight, gram) / self._energy[name]

    def run(self) -> QuantizedBlock:
        """Search, then fold and quantize, falling back wherever a linear would come out worse than by
        rounding: to identity, then to rounding itself.
        """
        chosen = {group.linears[0]: self._choose(group) for group in self._groups}
        rounded: set[str] = set()
        while True:
            weights, linears, errors = self._fold(chosen, rounded)
            worse = [n for n in self._linears if n not in rounded and errors[n] > self._rounding[n]]
            if not worse:
                break
            if not self._reset(chosen, worse[0]):
                rounded.add(worse[0])
        return QuantizedBlock(
            weights,
            linears,
            {name: LinearError(self._rounding[name], errors[name]) for name in self._linears},
            {" ".join(group.linears): chosen[group.linears[0]].label for group in self._groups},
        )

    def _choose(self, group: ScaleGroup) -> Candidate:
        """The candidate of least output loss among those that leave no linear worse off than rounding."""
        weights = {name: self._weights[f"{name}.weight"] for name in group.linears}
        gram = self._statistics[group.linears[0]].gram
        space = self.space(group)
        identity = space.make("identity", 0.0)
        if not self._is_scalable(group):
            return identity

        def rounding_loss(scales: Tensor) -> float:
            total = 0.0
            for name, weight in weights.items():
                rounded = round_to_nearest(weight * scales, self._group_size).dequantize() / scales
                total += output_energy(rounded - weight, gram) / self._energy[name]
            return total

        finalists = rank_candidates(space, rounding_loss)[:_NUM_FINALISTS]
        if all(candidate.method != "identity" for candidate in finalists):
            finalists.append(identity)
        best, least = identity, float("inf")
        for candidate in finalists:
            trial = {n: self._clipped(w, gram, candidate.scales, 1)[1] for n, w in weights.items()}
            errors = {n: output_energy(w - weights[n], gram) / self._energy[n] for n, w in trial.items()}
            if candidate.method != "identity" and any(errors[n] > self._rounding[n] for n in errors):
                continue
            loss = self._output_loss(group, trial) if self._calls.get(group.inspect) else sum(errors.values())
            if loss < least:
                best, least = candidate, loss
        return best

    def _clipped(
        self, weight: Tensor, gram: Tensor, scales: Tensor, sweeps: int
    ) -> tuple[QuantizedWeight, Tensor]:
        """Quantize weight * scales with searched ranges; the integers, and the weight they mean without the
        scales.
        """
        scaled = weight * scales
        scaled_gram = gram / scales / scales.unsqueeze(1)
        quantized = quantize(scaled, *search_ranges(scaled, scaled_gram, self._group_size, sweeps))
        return quantized, quantized.dequantize() / scales

    def _output_loss(self, group: ScaleGroup, trial: Weights) -> float:
        """Mean squared error of the inspected module's output in fp32, over the captured calls."""
        module = self._layer.get_submodule(group.inspect)
        prefix = group.inspect + "."
        exact = {n.removeprefix(prefix): w for n, w in self._weights.items() if n.startswith(prefix)}
        changed = {**exact, **{f"{n.removeprefix(prefix)}.weight": w for n, w in trial.items()}}
        calls = self._calls[group.inspect]
        if group.inspect not in self._references:
            self._references[group.inspect] = [
                _first(functional_call(module, exact, *call)) for call in calls
            ]
        total, count = 0.0, 0
        for call, reference in zip(calls, self._references[group.inspect], strict=True):
            difference = _first(functional_call(module, changed, *call)) - reference
            total += float(difference.square().sum())
            count += difference.numel()
        return total / count

    def _fold(
        self, chosen: dict[str, Candidate], rounded: Collection[str]
    ) -> tuple[Weights, dict[str, QuantizedWeight], dict[str, float]]:
        """The block folded and quantized, and each linear's error as seen from outside of the folding. The
        linears in `rounded` are not clipped.
        """
        folding = self.folding(chosen)
        folded = dict(folding.parameters)
        linears: dict[str, QuantizedWeight] = {}
        errors: dict[str, float] = {}
        for group in self._groups:
            gram = self._statistics[group.linears[0]].gram
            for name in group.linears:
                scales = folding.columns[name]
                inner = folding.inner(name)
                if name in rounded:
                    quantized = round_to_nearest(inner * scales, self._group_size)
                    effective = quantized.dequantize() / scales
                else:
                    quantized, effective = self._clipped(inner, gram, scales, _FINAL_SWEEPS)
                if not torch.isfinite(quantized.scales).all():
                    full_name = self._source.full_name(self._index, name)
                    raise QuantizerError(f"tensor {full_name}.weight: too large for fp16 scales")
                difference = folding.outer(name, effective) - self._weights[f"{name}.weight"]
                errors[name] = output_energy(difference, gram) / self._energy[name]
                linears[name] = quantized
                folded[f"{name}.weight"] = quantized.dequantize()
        return folded, linears, errors

    def folding(self, chosen: dict[str, Candidate]) -> Folding:
        """Fold one candidate per group, by the group's first linear; identity divides nothing."""
        scaled = []
        for group in self._groups:
            scales = chosen[group.linears[0]].scales
            scaled.append((group, scales, self.space(group).producer_scales(scales)))
        return fold(self._weights, self._source.architecture.linears, scaled, self._store)

    def _reset(self, chosen: dict[str, Candidate], name: str) -> bool:
        """Give up the scales that touch linear `name`: its columns' first, then its rows'. False when none
        are left.
        """
        for group in self._groups:
            is_touching = name in group.linears or group.previous == name
            if is_touching and chosen[group.linears[0]].method != "identity":
                chosen[group.linears[0]] = self.space(group).make("identity", 0.0)
                return True
        return False

    def _is_scalable(self, group: ScaleGroup) -> bool:
        """A linear that stays in full precision takes no scales: stored in 16 bits, dividing it would cost
        accuracy.
        """
        is_linear = group.previous in self._source.architecture.linears
        return not is_linear or group.previous in self._linears

    def space(self, group: ScaleGroup) -> ScaleSpace:
        """What candidates of a group are made from."""
        is_norm = group.previous not in self._source.architecture.linears
        producer_name = f"{group.previous}.weight" if is_norm else f"{group.previous}.bias"
        repeats = self._source.num_repeats if group.is_value else 1
        statistics = self._statistics[group.linears[0]]
        return ScaleSpace(
            x_mean=statistics.mean_abs,
            w_mean=weight_means([self._weights[f"{n}.weight"] for n in group.linears], self._group_size),
            num_repeats=repeats,
            head_size=self._source.head_size if group.is_value else 1,
            producer=self._weights.get(producer_name),
            dtype=self._dtype(producer_name) if producer_name in self._weights else torch.float32,
            is_norm=is_norm,
            offset=group.norm_offset,
        )

    def _dtype(self, name: str) -> torch.dtype:
        return STORED_DTYPES[self._source.checkpoint.dtype(self._source.full_name(self._index, name))]

    def _store(self, name: str, tensor: Tensor) -> Tensor:
        """As it will be read back: through the dtype on disk."""
        return tensor.to(self._dtype(name)).float()


def _first(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
