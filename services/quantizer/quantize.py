"""One decoder block from full precision to 4 bits: in which order what is collected, scaled, fitted, folded.

The linears see the calibration inputs that the (already quantized) blocks before them give. Where errors
are made up for (method "best"), the block is quantized in the order of its computation, so each linear sees
what the quantized ones before it give, and what the source would have given beside it. Everything is judged
through Gram matrices. This module does not know how the integers of a linear are found, nor files, nor
evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from services.quantizer.block_scales import BlockScales
from services.quantizer.config import BEST
from services.quantizer.fitting import GPTQ, ROUNDING, Inputs, TrialTask, sample_rows, try_methods
from services.quantizer.grid import MIN_SCALE, QuantizedWeight
from services.quantizer.group_fitting import SAMPLED_ROWS, GroupFitter, methods_worth_trying
from services.quantizer.guard import RoundingGuard, nonzero_energy
from services.quantizer.linear_record import linear_record
from services.quantizer.model_map import ScaleGroup
from services.quantizer.scales import Candidate, ScaleTask, rank_scales
from services.quantizer.source import Source, Weights
from services.quantizer.statistics import BlockInputs, InputStatistics, Moments
from services.quantizer.workers import SerialPool, WorkerPool
from weft.artifact.manifest import LinearError

_NUM_FINALISTS = 3


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """What came of a block.

    Attributes:
        weights: all parameters as the artifact means them, folded and dequantized, fp32.
        linears: the integers of every quantized linear.
        errors: of every quantized linear, over the calibration inputs.
        choices: per scale group, the candidate taken.
        records: per linear, what a report tells of it, JSON-able.
        has_left: whether the calibration streams have been taken through the block, in place.
    """

    weights: Weights
    linears: dict[str, QuantizedWeight]
    errors: dict[str, LinearError]
    choices: dict[str, str]
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    has_left: bool = False


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


@dataclass(slots=True)
class _Linear:
    """One linear as far as it has come. `effective` is the weight that its integers mean, seen from outside
    of all folding; `rows` what the rows of its integers have been divided by.
    """

    quantized: QuantizedWeight
    effective: Tensor
    candidate: Candidate
    method: str
    error: float
    held_out: dict[str, float]
    rows: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Trial:
    """Scales worth a fit: `producer` as it becomes under them, per linear the methods in the order of what
    they made of the held-out inputs, and those figures.
    """

    candidate: Candidate
    producer: _Linear | None
    orders: dict[str, list[str]]
    held_out: dict[str, dict[str, float]]


class BlockQuantizer:
    """Quantizes one block; make a new one for each.

    `exact` is the stream that the source's own blocks give; only method "best" makes use of it. With it,
    `run` takes both streams through the block, in place, unless `is_last`.

    Attributes:
        chosen: per group, by its first linear, the scales taken; filled by `run`.
    """

    def __init__(
        self,
        source: Source,
        index: int,
        weights: Weights,
        hidden: Tensor,
        group_size: int,
        skipped: set[str],
        *,
        method: str = BEST,
        exact: Tensor | None = None,
        pool: WorkerPool | None = None,
        is_last: bool = False,
    ) -> None:
        self._weights, self._group_size, self._is_last = weights, group_size, is_last
        self._groups = [g for g in source.architecture.groups if not skipped.intersection(g.linears)]
        self._is_staged = exact is not None
        self._methods = methods_worth_trying(method, len(hidden), has_exact=self._is_staged)
        self._pool = SerialPool() if pool is None else pool
        self._inputs = BlockInputs(source, index, weights, hidden, exact, self._groups)
        self._scales = BlockScales(source, index, weights, self._groups, group_size)
        self._guard = RoundingGuard(weights, group_size, partial(source.full_name, index))
        self._fitter = GroupFitter(weights, group_size, self._methods, self._pool, self._guard)
        self._linears: dict[str, _Linear] = {}
        self._grams: dict[str, Tensor] = {}
        self.chosen: dict[str, Candidate] = {}

    def run(self) -> QuantizedBlock:
        """Stage by stage: collect, choose scales, find integers."""
        current = dict(self._weights)
        for stage in [[group] for group in self._groups] if self._is_staged else [self._groups]:
            statistics = self._inputs.collect(stage, current)
            for group in stage:
                self._quantize_group(group, statistics.pop(group.linears[0]))
                for name, linear in self._linears.items():
                    current[f"{name}.weight"] = linear.effective
        if self._is_staged and not self._is_last:
            self._inputs.leave(current)
        current.clear()  # what it holds goes linear by linear in the end
        return self._finish()

    def _quantize_group(self, group: ScaleGroup, statistics: InputStatistics) -> None:
        """Scales and integers of the linears that share one input: the first candidate that leaves none of
        them, nor what produces the input, worse than rounding. Identity does.
        """
        fitted, held = statistics.fitted, statistics.held
        self._guard.require_finite(group.linears[0], fitted.gram)
        if held is not None:
            self._guard.require_finite(group.linears[0], held.gram)
        trials = self._trials(group, self._candidates(group, statistics), fitted, held or fitted)
        if held is not None:
            fitted.merge(held)
        del statistics, held  # as large as what is fitted on
        for name in group.linears:
            self._guard.measure(name, fitted.gram)
        for trial in trials:
            candidate = trial.candidate
            found = self._fitter.fit(group, candidate, fitted, trial.orders)
            if found is None:
                continue
            for name, fit in found.items():
                self._linears[name] = _Linear(
                    fit.quantized, fit.effective, candidate, fit.method, fit.error, trial.held_out[name]
                )
            if trial.producer is not None:
                self._linears[group.previous] = trial.producer
            break
        self.chosen[group.linears[0]] = candidate
        producers = {other.previous for other in self._groups}
        self._grams.update((name, fitted.gram) for name in group.linears if name in producers)

    def _candidates(self, group: ScaleGroup, statistics: InputStatistics) -> list[Candidate]:
        """Scales to try, the best first, identity last."""
        space = self._scales.space(group, statistics.mean_abs)
        identity = space.make("identity", 0.0)
        if not self._scales.is_scalable(group):
            return [identity]
        gram, is_swept = statistics.fitted.gram, GPTQ in self._methods
        sampled = {name: sample_rows(self._weights[f"{name}.weight"], SAMPLED_ROWS) for name in group.linears}
        energies = {name: nonzero_energy(weight, gram) for name, weight in sampled.items()}
        importance = [
            weight.new_full((len(weight),), 1.0 / energies[name]) for name, weight in sampled.items()
        ]
        task = ScaleTask(
            space, torch.cat(list(sampled.values())), torch.cat(importance), gram, self._group_size, is_swept
        )
        (ranked,) = self._pool.map(rank_scales, [task])
        if not is_swept:
            ranked = self._finals(ranked[:_NUM_FINALISTS], task)
        best = ranked[0]
        return [identity] if best.method == "identity" else [best, identity]

    def _finals(self, finalists: list[Candidate], task: ScaleTask) -> list[Candidate]:
        """By the errors that the method itself leaves."""
        inputs = Inputs(task.gram, None)
        tasks = [
            TrialTask(
                task.weight * task.importance.sqrt().unsqueeze(1), c.scales, inputs, inputs, self._group_size,
                self._methods,
            )
            for c in finalists
        ]  # fmt: skip
        losses = [min(loss[m] for m in self._methods) for loss in self._pool.map(try_methods, tasks)]
        return [finalists[i] for i in sorted(range(len(finalists)), key=lambda i: losses[i])]

    def _trials(
        self, group: ScaleGroup, candidates: list[Candidate], fitted: Moments, held: Moments
    ) -> list[_Trial]:
        """What to fit, in turn, identity last. All that is judged on held-out inputs is judged here: later
        they are among what is fitted on.
        """
        trials: list[_Trial] = []
        for candidate in candidates:
            is_identity = candidate.method == "identity"
            producer = None if is_identity else self._rescaled(group, candidate)
            if not is_identity and group.previous in self._linears and producer is None:
                continue
            if trials and all(trials[-1].orders.values()):
                # A fit on everything that fails is rare: then the ranking under scales has to do.
                orders = {name: [*order, ROUNDING] for name, order in trials[-1].orders.items()}
                trials.append(_Trial(candidate, None, orders, trials[-1].held_out))
            else:
                orders, held_out = self._fitter.rank_methods(group, candidate, fitted, held)
                trials.append(_Trial(candidate, producer, orders, held_out))
        return trials

    def _rescaled(self, group: ScaleGroup, candidate: Candidate) -> _Linear | None:
        """What produces the group's input, its rows divided by as much as the columns are multiplied: the
        integers stay, their fp16 scales are rounded once more. None if there is none, or if it would be worse
        than by rounding.
        """
        name = group.previous
        if name not in self._linears:
            return None
        linear = self._linears[name]
        rows = self._scales.producer_rows(group, candidate.scales)
        scales = (linear.quantized.scales.float() / rows.unsqueeze(1)).clamp(min=MIN_SCALE).half()
        quantized = QuantizedWeight(linear.quantized.values, linear.quantized.zeros, scales)
        effective = quantized.dequantize() / linear.candidate.scales * rows.unsqueeze(1)
        error = self._guard.error(name, effective, self._grams[name])
        if not self._guard.allows(name, error):
            return None
        return replace(linear, quantized=quantized, effective=effective, error=error, rows=rows)

    def _finish(self) -> QuantizedBlock:
        folded = self._scales.folding(self.chosen).parameters
        errors, records, linears = {}, {}, {}
        for name in [name for group in self._groups for name in group.linears]:
            linear = self._linears.pop(name)
            weight = self._weights[f"{name}.weight"]
            errors[name] = LinearError(self._guard.rounding[name], linear.error)
            records[name] = linear_record(
                weight, linear.effective, linear.quantized, linear.candidate, linear.method, errors[name],
                linear.held_out, linear.rows,
            )  # fmt: skip
            linears[name] = linear.quantized
            folded[f"{name}.weight"] = linear.quantized.dequantize()
        choices = {" ".join(g.linears): self.chosen[g.linears[0]].label for g in self._groups}
        return QuantizedBlock(folded, linears, errors, choices, records, self._is_staged)
