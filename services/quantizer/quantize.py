"""One decoder block from full precision to 4 bits: statistics, scales, integers, guards, folding.

The linears see the calibration inputs that the (already quantized) blocks before them give. Where errors
are made up for (method "best"), the block is quantized in the order of its computation, so each linear sees
what the quantized ones before it give, and what the source would have given beside it. Everything is judged
through Gram matrices. This module does not know files, nor evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from services.quantizer.config import BEST
from services.quantizer.errors import QuantizerError
from services.quantizer.fitting import (
    CLIP,
    GPTAQ,
    GPTQ,
    ROUNDING,
    SEARCH,
    FitTask,
    Inputs,
    TrialTask,
    fit_rows,
    join,
    sample_rows,
    try_methods,
)
from services.quantizer.folding import Folding, fold
from services.quantizer.grid import MIN_SCALE, QuantizedWeight, round_to_nearest
from services.quantizer.linear_record import linear_record
from services.quantizer.model_map import ScaleGroup
from services.quantizer.scales import (
    Candidate,
    ScaleSpace,
    ScaleTask,
    one_per_producer,
    rank_scales,
    weight_means,
)
from services.quantizer.source import STORED_DTYPES, Source, Weights
from services.quantizer.statistics import BlockInputs, InputStatistics, Moments, output_energy
from services.quantizer.workers import SerialPool, WorkerPool
from weft.artifact.manifest import LinearError

_MEANS = {"awq": (CLIP,), "awq+": (SEARCH,), "gptq": (GPTQ,), BEST: (GPTAQ, GPTQ, SEARCH)}
"""Per method of the configuration, the ways to find integers, the likeliest first."""
_SAMPLED_ROWS = 256
_WEIGHTS_PER_TASK = 4 << 20
_MAX_ROWS_PER_TASK = 2048
_NUM_FINALISTS = 3
_TINY = torch.finfo(torch.float32).tiny


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
        self._source, self._index, self._weights, self._group_size = source, index, weights, group_size
        self._groups = [g for g in source.architecture.groups if not skipped.intersection(g.linears)]
        self._names = [name for group in self._groups for name in group.linears]
        self._methods, self._is_last = _methods(method, len(hidden), has_exact=exact is not None), is_last
        self._pool = SerialPool() if pool is None else pool
        self._is_staged = exact is not None
        self._inputs = BlockInputs(source, index, weights, hidden, exact, self._groups)
        self._linears: dict[str, _Linear] = {}
        self._rounding: dict[str, float] = {}
        self._energy: dict[str, float] = {}
        self.chosen: dict[str, Candidate] = {}
        self._grams: dict[str, Tensor] = {}

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
        self._require_finite(group, fitted.gram)
        if held is not None:
            self._require_finite(group, held.gram)
        trials = self._trials(group, self._candidates(group, statistics), fitted, held or fitted)
        if held is not None:
            fitted.merge(held)
        del statistics, held  # as large as what is fitted on
        for name in group.linears:
            self._measure(name, fitted.gram)
        for trial in trials:
            candidate = trial.candidate
            found = self._fit(group, candidate, fitted, trial.orders)
            if found is None:
                continue
            for name, (quantized, effective, method, error) in found.items():
                held_out = trial.held_out[name]
                self._linears[name] = _Linear(quantized, effective, candidate, method, error, held_out)
            if trial.producer is not None:
                self._linears[group.previous] = trial.producer
            break
        self.chosen[group.linears[0]] = candidate
        producers = {other.previous for other in self._groups}
        self._grams.update((name, fitted.gram) for name in group.linears if name in producers)

    def _candidates(self, group: ScaleGroup, statistics: InputStatistics) -> list[Candidate]:
        """Scales to try, the best first, identity last."""
        space = self.space(group, statistics.mean_abs)
        identity = space.make("identity", 0.0)
        if not self._is_scalable(group):
            return [identity]
        gram, is_swept = statistics.fitted.gram, GPTQ in self._methods
        sampled = {
            name: sample_rows(self._weights[f"{name}.weight"], _SAMPLED_ROWS) for name in group.linears
        }
        energies = {name: max(output_energy(weight, gram), _TINY) for name, weight in sampled.items()}
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
                trials.append(_Trial(candidate, producer, *self._try(group, candidate, fitted, held)))
        return trials

    def _try(
        self, group: ScaleGroup, candidate: Candidate, fitted: Moments, held: Moments
    ) -> tuple[dict[str, list[str]], dict[str, dict[str, float]]]:
        """Per linear the methods worth a fit, the best first, and what each made of the held-out inputs."""
        tasks = [
            TrialTask(
                sample_rows(self._weights[f"{name}.weight"], _SAMPLED_ROWS),
                candidate.scales,
                _sampled_inputs(fitted, name),
                _sampled_inputs(held, name),
                self._group_size,
                self._methods,
            )
            for name in group.linears
        ]
        orders, told = {}, {}
        for name, losses in zip(group.linears, self._pool.map(try_methods, tasks), strict=True):
            ranked = sorted(
                losses, key=lambda method: losses[method] if losses[method] == losses[method] else math.inf
            )
            orders[name] = ranked[: ranked.index(ROUNDING)]
            if candidate.method == "identity":
                orders[name].append(ROUNDING)
            energy = max(output_energy(self._weights[f"{name}.weight"], held.gram), _TINY)
            told[name] = {m: _short(max(loss + held.gap[name] / energy, 0.0)) for m, loss in losses.items()}
        return orders, told

    def _fit(
        self, group: ScaleGroup, candidate: Candidate, fitted: Moments, orders: dict[str, list[str]]
    ) -> dict[str, tuple[QuantizedWeight, Tensor, str, float]] | None:
        """(integers, what they mean, method, error) of every linear; None if one would be worse than by
        rounding.
        """
        left = {name: list(order) for name, order in orders.items()}
        found: dict[str, tuple[QuantizedWeight, Tensor, str, float]] = {}
        while left:
            if not all(left.values()):
                return None
            methods = {name: order.pop(0) for name, order in left.items()}
            tasks = [
                (name, FitTask(rows, candidate.scales, inputs, self._group_size, method))
                for name, method in methods.items()
                for rows, inputs in self._parts(name, fitted)
            ]
            results = self._pool.map(fit_rows, [task for _, task in tasks])
            for name, method in methods.items():
                quantized = join([r for (n, _), r in zip(tasks, results, strict=True) if n == name])
                effective = quantized.dequantize() / candidate.scales
                error = self._error(name, effective, fitted.gram)
                if error <= self._rounding[name]:
                    found[name] = quantized, effective, method, error
                    del left[name]
                elif method == ROUNDING:
                    full_name = self._source.full_name(self._index, name)
                    raise QuantizerError(f"tensor {full_name}.weight: too large for fp16 scales")
        return found

    def _parts(self, name: str, moments: Moments) -> list[tuple[Tensor, Inputs]]:
        """Rows of a linear that are fitted at once, and what is known of its inputs."""
        parts = _split(self._weights[f"{name}.weight"])
        pulls = _split(moments.pulls[name]) if name in moments.pulls else [None] * len(parts)
        return [(rows, Inputs(moments.gram, pull)) for rows, pull in zip(parts, pulls, strict=True)]

    def _measure(self, name: str, gram: Tensor) -> None:
        weight = self._weights[f"{name}.weight"]
        energy = output_energy(weight, gram)
        if not math.isfinite(energy):
            raise self._not_finite(name)
        self._energy[name] = max(energy, _TINY)
        rounded = round_to_nearest(weight, self._group_size).dequantize()
        self._rounding[name] = self._error(name, rounded, gram)

    def _require_finite(self, group: ScaleGroup, gram: Tensor) -> None:
        if not torch.isfinite(gram.diagonal()).all():
            raise self._not_finite(group.linears[0])

    def _not_finite(self, name: str) -> QuantizerError:
        full_name = self._source.full_name(self._index, name)
        return QuantizerError(f"tensor {full_name}.weight: its inputs or outputs on the text are not finite")

    def _error(self, name: str, effective: Tensor, gram: Tensor) -> float:
        return output_energy(effective - self._weights[f"{name}.weight"], gram) / self._energy[name]

    def _rescaled(self, group: ScaleGroup, candidate: Candidate) -> _Linear | None:
        """What produces the group's input, its rows divided by as much as the columns are multiplied: the
        integers stay, their fp16 scales are rounded once more. None if there is none, or if it would be worse
        than by rounding.
        """
        name = group.previous
        if name not in self._linears:
            return None
        linear = self._linears[name]
        rows = _full_rows(self._producer_scales(group, candidate.scales), len(linear.effective))
        scales = (linear.quantized.scales.float() / rows.unsqueeze(1)).clamp(min=MIN_SCALE).half()
        quantized = QuantizedWeight(linear.quantized.values, linear.quantized.zeros, scales)
        effective = quantized.dequantize() / linear.candidate.scales * rows.unsqueeze(1)
        error = self._error(name, effective, self._grams[name])
        if not error <= self._rounding[name]:
            return None
        return replace(linear, quantized=quantized, effective=effective, error=error, rows=rows)

    def _finish(self) -> QuantizedBlock:
        folded = self.folding(self.chosen).parameters
        errors, records, linears = {}, {}, {}
        for name in self._names:
            linear = self._linears.pop(name)
            weight = self._weights[f"{name}.weight"]
            errors[name] = LinearError(self._rounding[name], linear.error)
            records[name] = linear_record(
                weight, linear.effective, linear.quantized, linear.candidate, linear.method, errors[name],
                linear.held_out, linear.rows,
            )  # fmt: skip
            linears[name] = linear.quantized
            folded[f"{name}.weight"] = linear.quantized.dequantize()
        choices = {" ".join(g.linears): self.chosen[g.linears[0]].label for g in self._groups}
        return QuantizedBlock(folded, linears, errors, choices, records, self._is_staged)

    def folding(self, chosen: dict[str, Candidate]) -> Folding:
        """Fold one candidate per group, by the group's first linear; identity divides nothing."""
        scaled = []
        for group in self._groups:
            scales = chosen[group.linears[0]].scales
            scaled.append((group, scales, self._producer_scales(group, scales)))
        return fold(self._weights, self._source.architecture.linears, scaled, self._store)

    def _is_scalable(self, group: ScaleGroup) -> bool:
        """A linear that stays in full precision takes no scales: stored in 16 bits, dividing it would cost
        accuracy.
        """
        is_linear = group.previous in self._source.architecture.linears
        return not is_linear or group.previous in self._names

    def space(self, group: ScaleGroup, mean_abs: Tensor) -> ScaleSpace:
        """What candidates of a group are made from; `mean_abs` [in] of its inputs."""
        is_norm = group.previous not in self._source.architecture.linears
        producer_name = f"{group.previous}.weight" if is_norm else f"{group.previous}.bias"
        repeats = self._source.num_repeats if group.is_value else 1
        return ScaleSpace(
            x_mean=mean_abs,
            w_mean=weight_means([self._weights[f"{n}.weight"] for n in group.linears], self._group_size),
            num_repeats=repeats,
            head_size=self._source.head_size if group.is_value else 1,
            producer=self._weights.get(producer_name),
            dtype=self._dtype(producer_name) if producer_name in self._weights else torch.float32,
            is_norm=is_norm,
            offset=group.norm_offset,
        )

    def _producer_scales(self, group: ScaleGroup, scales: Tensor) -> Tensor:
        return one_per_producer(
            scales, self._source.num_repeats if group.is_value else 1, self._source.head_size
        )

    def _dtype(self, name: str) -> torch.dtype:
        return STORED_DTYPES[self._source.checkpoint.dtype(self._source.full_name(self._index, name))]

    def _store(self, name: str, tensor: Tensor) -> Tensor:
        """As it will be read back: through the dtype on disk."""
        return tensor.to(self._dtype(name)).float()


def _methods(method: str, num_windows: int, *, has_exact: bool) -> tuple[str, ...]:
    """What is worth a trial. Of several, a sweep needs windows to be judged on that it has not seen: on one
    alone it fits what it sees and nothing else, while a search of ranges cannot stray far. And what the
    inputs have lost is known with an exact stream only.
    """
    if method == BEST and num_windows == 1:
        return (SEARCH,)
    return tuple(means for means in _MEANS[method] if means != GPTAQ or has_exact)


def _sampled_inputs(moments: Moments, name: str) -> Inputs:
    """For the rows that `sample_rows` takes of a linear."""
    pull = moments.pulls.get(name)
    return Inputs(moments.gram, None if pull is None else sample_rows(pull, _SAMPLED_ROWS))


def max_rows_at_once(num_in: int) -> int:
    """Rows that are fitted at once: few where they are long, for a fit takes some ten times their memory."""
    rows = _WEIGHTS_PER_TASK // num_in // _SAMPLED_ROWS * _SAMPLED_ROWS
    return min(_MAX_ROWS_PER_TASK, max(_SAMPLED_ROWS, rows))


def _split(weight: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = weight.split(max_rows_at_once(weight.shape[1]))
    return parts


def _full_rows(producer_scales: Tensor, num_rows: int) -> Tensor:
    """A producer that has more rows than there are scales produces with its last ones."""
    return torch.cat([producer_scales.new_ones(num_rows - len(producer_scales)), producer_scales])


def _short(value: float) -> float:
    return float(f"{value:.6g}")
