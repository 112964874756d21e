"""What the search needs to know of a block's inputs: Gram matrices and means, collected in stages.

A stage is one or several scale groups. The block runs with whatever of it is quantized by then, so a later
stage sees the errors of the earlier ones; beside it, if there is an exact stream, the source's own block
runs on that, and what separates the two inputs is collected as well. A module whose linears are all done runs
once more and is replayed from then on, and no run goes on behind what it is for. This module does not know
how a run is heard, replayed or ended, nor what is done with what it collects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from services.quantizer.block_stream import BlockStream
from services.quantizer.model_map import ScaleGroup
from services.quantizer.source import Source, Weights

_HELD_OUT = 4
"""Every so manieth window is held out."""


@dataclass(slots=True)
class Moments:
    """Of inputs X [tokens, in], and of D = X_exact - X where there is an exact stream.

    Attributes:
        gram: fp32 [in, in] = X^T X.
        pulls: per linear fp32 [out, in] = W D^T X; empty without an exact stream. Where `out` is smaller
            than `in`, which is where memory counts, this is smaller than D^T X.
        gap: per linear ||D W^T||^2, the error that W itself makes on X.
    """

    gram: Tensor
    pulls: dict[str, Tensor]
    gap: dict[str, float]

    @classmethod
    def zeros(cls, weights: Weights, linears: Sequence[str], *, has_exact: bool) -> Moments:
        """Of no tokens; `weights` of the linears."""
        weight = weights[f"{linears[0]}.weight"]
        gram = weight.new_zeros(weight.shape[1], weight.shape[1])
        pulls = {name: torch.zeros_like(weights[f"{name}.weight"]) for name in linears if has_exact}
        return cls(gram, pulls, dict.fromkeys(linears, 0.0))

    def merge(self, other: Moments) -> None:
        """Take the tokens of `other` in."""
        self.gram += other.gram
        for name, pull in other.pulls.items():
            self.pulls[name] += pull
        for name, gap in other.gap.items():
            self.gap[name] += gap

    def add(self, inputs: Tensor, exact: Tensor | None, weights: Weights) -> None:
        """`inputs` and `exact` [tokens, in]; `weights` of the linears."""
        self.gram.addmm_(inputs.T, inputs)
        if exact is None:
            return
        difference = exact - inputs
        for name, pull in self.pulls.items():
            lost = difference @ weights[f"{name}.weight"].T
            pull.addmm_(lost.T, inputs)
            self.gap[name] += float(lost.square().sum())


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Of one scale group's input.

    Attributes:
        fitted: over the calibration windows that integers are found on.
        held: over those held out; None when there is but one window.
        mean_abs: fp32 [in], mean |x| over all.
    """

    fitted: Moments
    held: Moments | None
    mean_abs: Tensor


class BlockInputs:
    """Runs one block on the calibration windows, stage by stage.

    `hidden` [windows, length, hidden] is the stream that the quantized blocks before it gave; `exact` what
    the source's own gave, or None. `groups` are all that will be asked for, in order of the computation.
    """

    def __init__(
        self,
        source: Source,
        index: int,
        weights: Weights,
        hidden: Tensor,
        exact: Tensor | None,
        groups: Sequence[ScaleGroup],
    ) -> None:
        self._source, self._index, self._weights = source, index, weights
        layer = source.block(index)
        self._quantized = BlockStream(layer, hidden)
        self._exact = None if exact is None else BlockStream(layer, exact)
        self._is_exact_behind = False
        self._left = {_module(group): [g for g in groups if _module(g) == _module(group)] for group in groups}

    def collect(self, groups: Sequence[ScaleGroup], current: Weights) -> dict[str, InputStatistics]:
        """Of the inputs of `groups`, under their first linears' names. `current` are the block's weights with
        what is quantized by now. With the last of the groups the exact stream leaves the block.
        """
        done = [name for name, left in self._left.items() if not left]
        for group in groups:
            self._left[_module(group)].remove(group)
        last, is_last = groups[-1], not any(self._left.values())
        closing = [] if self._left[_module(last)] or is_last else [_module(last)]
        collector = _Collector(
            self._weights,
            groups,
            self._quantized.hidden.shape[0],
            self._source.device,
            has_exact=self._exact is not None,
        )
        hidden = self._quantized.hidden
        for window, batch, positions in self._source.batches(hidden, self._index):
            if self._exact is not None:
                exact = self._exact.hidden[window].to(batch.device)
                output = self._exact.run(
                    self._weights,
                    window,
                    exact,
                    positions,
                    listeners=collector.exact_listeners(),
                    record=closing,
                    before=None if closing or is_last else last.linears[0],
                    behind=closing[0] if closing else None,
                )
                if output is not None:
                    self._exact.hidden[window] = output.to(hidden.device)
            self._quantized.run(
                current,
                window,
                batch,
                positions,
                listeners=collector.listeners(window),
                record=[name for name in done if name not in self._quantized.complete],
                before=last.linears[0],
            )
        self._quantized.complete.update(done)
        if self._exact is not None:
            self._exact.complete.update(closing)
            self._is_exact_behind = is_last
        return collector.finish(hidden.shape[0] * hidden.shape[1])

    def leave(self, current: Weights) -> None:
        """Take `hidden` through the block, in place; and `exact`, if that has not happened."""
        streams = [(self._quantized, current)]
        if self._exact is not None and not self._is_exact_behind:
            streams.append((self._exact, self._weights))
        for stream, weights in streams:
            for window, batch, positions in self._source.batches(stream.hidden, self._index):
                output = stream.run(weights, window, batch, positions)
                if output is not None:
                    stream.hidden[window] = output.to(stream.hidden.device)


class _Collector:
    """Adds up what the linears of some groups take."""

    def __init__(
        self,
        weights: Weights,
        groups: Sequence[ScaleGroup],
        num_windows: int,
        device: torch.device,
        *,
        has_exact: bool,
    ) -> None:
        self._weights, self._num_windows = weights, num_windows
        self._fitted: dict[str, Moments] = {}
        self._held: dict[str, Moments] = {}
        self._sums: dict[str, Tensor] = {}
        self._exact: dict[str, Tensor] = {}
        for group in groups:
            name = group.linears[0]
            num_in = weights[f"{name}.weight"].shape[1]
            self._sums[name] = torch.zeros(num_in, device=device)
            for moments in (self._fitted, self._held):
                moments[name] = Moments.zeros(weights, group.linears, has_exact=has_exact)

    def exact_listeners(self) -> dict[str, Callable[[Tensor], None]]:
        """For the exact stream, whose batch goes first."""

        def capture(name: str, inputs: Tensor) -> None:
            self._exact[name] = inputs

        return {name: partial(capture, name) for name in self._fitted}

    def listeners(self, window: slice) -> dict[str, Callable[[Tensor], None]]:
        """For the windows `window`."""
        held = [is_held_out(i, self._num_windows) for i in range(*window.indices(self._num_windows))]
        parts = [
            (moments, [position for position, other in enumerate(held) if other is is_held])
            for moments, is_held in ((self._fitted, False), (self._held, True))
        ]

        def add(name: str, inputs: Tensor) -> None:
            exact = self._exact.pop(name, None)
            self._sums[name] += inputs.abs().sum((0, 1))
            for moments, windows in parts:
                if windows:
                    self._add(moments[name], inputs[windows], None if exact is None else exact[windows])

        return {name: partial(add, name) for name in self._fitted}

    def _add(self, moments: Moments, inputs: Tensor, exact: Tensor | None) -> None:
        flat = None if exact is None else exact.flatten(0, 1)
        moments.add(inputs.flatten(0, 1), flat, self._weights)

    def finish(self, num_tokens: int) -> dict[str, InputStatistics]:
        """What came of `num_tokens` tokens."""
        has_held = self._num_windows > 1
        return {
            name: InputStatistics(
                fitted, self._held[name] if has_held else None, self._sums[name] / num_tokens
            )
            for name, fitted in self._fitted.items()
        }


def is_held_out(window: int, num_windows: int) -> bool:
    """Whether integers are judged on it, and not found on it. Of few windows it is the last; one alone is
    needed for finding.
    """
    if num_windows < _HELD_OUT:
        return 0 < window == num_windows - 1
    return window % _HELD_OUT == _HELD_OUT - 1


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """||X W^T||^2 = tr(W H W^T) for `weight` [out, in]."""
    return max(float(((weight @ gram) * weight).sum(dtype=torch.float64)), 0.0)


def _module(group: ScaleGroup) -> str:
    """The module that a group's linears are in."""
    return group.linears[0].rpartition(".")[0]
